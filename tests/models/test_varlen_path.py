"""The path that CUDA takes, on the CPU: its layout, its plans and its calls, with the kernel's documented meaning in its place.

What is not proved here is that the kernel means it: see the tests marked `gpu` beside this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import FAMILIES, LENGTHS, VOCABULARY, alone, pack
from test_slot_cache import LENGTH, SLOTS, Texts
from test_step import Stepped

from katds.models import attention, slot_cache
from katds.models.causal import FlatCausalLM, linear
from katds.models.graph_step import StaticStep
from katds.models.plans import SlotPlan

PAGE = 16
calls: list[dict[str, Any]] = []


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    seqused_k: torch.Tensor | None = None, block_table: torch.Tensor | None = None, num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn by its documentation: windows count from the last query and the last key."""
    assert enable_gqa and query.is_contiguous() and cu_seq_q.dtype == torch.int32 and cu_seq_k.dtype == torch.int32
    slots = cu_seq_q.numel() - 1
    assert cu_seq_k.numel() == slots + 1 and int(cu_seq_q[-1]) == query.shape[0]
    calls.append({"slots": slots, "max_q": max_q, "window": window_size})
    outs = []
    for i in range(slots):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        if block_table is not None:
            assert num_splits == 1 and block_table.dtype == seqused_k.dtype == torch.int32
            assert key.shape[1] == value.shape[1] == PAGE and block_table.shape[0] == seqused_k.numel() == slots
            k, v = (pool[block_table[i]].flatten(0, 1)[: seqused_k[i]] for pool in (key, value))
        else:
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        assert q.shape[0] <= max_q and k.shape[0] <= max_k
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (k, v))
        gap = torch.arange(k.shape[1] - q.shape[0], k.shape[1])[:, None] - torch.arange(k.shape[1])
        left, right = window_size
        hidden = (gap > left if left >= 0 else torch.zeros_like(gap, dtype=torch.bool)) | (
            gap < -right if right >= 0 else torch.zeros_like(gap, dtype=torch.bool)
        )
        weights = (q.transpose(0, 1) @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append((weights @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has flash kernels, for float64."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)  # flash-attn, should it be installed
    monkeypatch.setattr(attention, "FLASH_TYPES", (torch.float64,))
    for module in (attention, slot_cache):
        monkeypatch.setattr(module, "has_flash", lambda device: True)
    monkeypatch.setattr(slot_cache, "PAGE", PAGE)
    calls.clear()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_equals_full_forwards(
    family: Any, seed: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FlatCausalLM(family("katds").double().eval(), VOCABULARY)
    texts = Stepped(StaticStep, model, seed) if static else Texts(model, seed)
    monkeypatch.setattr(SlotPlan, "groups", property(lambda self: pytest.fail("groups are made for nothing")))
    texts.play(family("exact").double().eval())
    assert texts.cache.length == -(-LENGTH // PAGE) * PAGE
    assert {call["window"][1] for call in calls} == {0, -1}
    assert all(call["max_q"] == 1 for call in calls if call["window"][1] == -1)


@torch.no_grad()
def test_prompts_of_one_token_beside_none_are_not_single() -> None:
    """A slot without a query among slots with one: the kernel could not reshape tokens to slots."""
    texts = Texts(FlatCausalLM(FAMILIES[0]("katds").double().eval(), VOCABULARY), 0)
    texts.feed(1, [texts.tokens(1), [], texts.tokens(1)], 0)
    assert {call["window"][1] for call in calls} == {0}
    texts.step(SLOTS, 0)
    torch.testing.assert_close(
        texts.seen(), alone(FAMILIES[0]("exact").double().eval(), texts.texts()), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_and_their_gradients(family: Any) -> None:
    sequences, ids, positions, plan = pack(LENGTHS)
    flat, plain = family("katds").double(), family("exact").double()
    packed, expected = FlatCausalLM(flat, VOCABULARY)(ids, positions, plan, linear), alone(plain, sequences)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-9)
    packed.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for own, other in zip(flat.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-7, atol=1e-7)
    assert len(calls) == 2, "a call a layer"
