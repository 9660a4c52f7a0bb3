"""Attention in C is attention by the book, as exact as PyTorch's, for every shape of heads, window and layout in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from test_attention import FAMILIES, VOCABULARY, alone
from test_slot_cache import Texts
from torch.nn.functional import scaled_dot_product_attention

from katds.models.causal import FlatCausalLM
from katds.models.native import attention, build
from katds.models.plans import PackedPlan

# Only where nothing can be compiled: code that is compiled and wrong must fail here.
try:
    build.library()
except build.Unavailable as reason:
    pytest.skip(f"no attention in C: {reason}", allow_module_level=True)

CPU = torch.device("cpu")
LENGTHS = [1, 63, 64, 65, 130, 3, 200]  # around the block of 64 queries, and of several blocks
SHAPES = [(4, 2, 32), (4, 4, 64), (6, 2, 8), (2, 1, 80), (8, 2, 128), (3, 1, 5)]
WINDOWS = [None, 2, 7, 64, 100]


def numbers(heads: int, kv_heads: int, dim: int, layout: str) -> list[torch.Tensor]:
    """q, k, v [N, heads, dim], and the gradient of the result."""
    draw = torch.Generator().manual_seed(heads * dim)
    tokens, tensors = sum(LENGTHS), []
    for count in (heads, kv_heads, kv_heads, heads):
        if layout == "heads first":
            tensor = torch.randn(count, tokens, dim, generator=draw).transpose(0, 1)
        elif layout == "one matrix":  # as a fused projection gives them
            tensor = torch.randn(tokens, count + 2, dim + 3, generator=draw)[:, 1:-1, 2:-1]
        else:
            tensor = torch.randn(dim, count, tokens, generator=draw).permute(2, 1, 0)
        tensors.append(tensor)
    return tensors


def by_the_book(q: Any, k: Any, v: Any, scale: float, window: int | None) -> torch.Tensor:
    """One sequence in float64: [T, heads, dim]."""
    share, length = q.shape[1] // k.shape[1], len(q)
    gap = torch.arange(length)[:, None] - torch.arange(length)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(share, 1)) * scale
    scores = scores.masked_fill((gap < 0) | (gap >= (window or length)), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(share, 1))


def pytorchs(q: Any, k: Any, v: Any, scale: float, window: int | None) -> torch.Tensor:
    length = len(q)
    gap = torch.arange(length)[:, None] - torch.arange(length)
    mask = (gap >= 0) & (gap < (window or length))
    qkv = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(*qkv, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1)


def sequence_by_sequence(way: Any, q: Any, k: Any, v: Any, scale: float, window: int | None) -> torch.Tensor:
    return torch.cat([way(*part, scale, window) for part in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)])


def packed(q: Any, k: Any, v: Any, scale: float, window: int | None) -> torch.Tensor:
    return attention.packed(q, k, v, scale, window, PackedPlan.of(LENGTHS, CPU).runs)


def results(way: Any, tensors: list[torch.Tensor], scale: float, window: int | None) -> list[torch.Tensor]:
    """The value, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]  # detach keeps the layout
    out = way(*leaves, scale, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_exact_as_pytorchs(shape: tuple[int, int, int], window: int | None) -> None:
    scale = 3.0 / shape[2] ** 0.5  # sharp enough for single keys to matter
    tensors = numbers(*shape, "heads first")
    mine = results(packed, tensors, scale, window)
    own = results(lambda *a: sequence_by_sequence(pytorchs, *a), tensors, scale, window)
    right = results(lambda *a: sequence_by_sequence(by_the_book, *a), [x.double() for x in tensors], scale, window)
    # Gradients come from grad x out, as in flash attention, which rounds more than PyTorch's sum where a window has two keys: 1.9 times
    # as much with AVX-512, 2.03 with AVX2.
    for a, b, exact, times in zip(mine, own, right, (2, 2.5, 2.5, 2), strict=True):
        assert a.dtype == torch.float32 and exact.dtype == torch.float64
        assert (a - exact).norm() <= times * (b - exact).norm() and (b - exact).norm() < 5e-6 * exact.norm()


def test_a_window_of_one_key_has_no_choice() -> None:
    tensors = numbers(4, 2, 32, "heads first")
    out, grad_q, grad_k, grad_v = results(packed, tensors, 0.2, 1)
    assert torch.equal(out, tensors[2].repeat_interleave(2, 1))
    for grad in (grad_q, grad_k):  # exactly, they would be zero
        assert grad.norm() < 1e-6 * tensors[3].norm()
    torch.testing.assert_close(grad_v, tensors[3].unflatten(1, (2, 2)).sum(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["heads first", "one matrix", "strided"])
def test_any_layout_in_memory(layout: str) -> None:
    tensors = numbers(4, 2, 32, layout)
    whole = [x.contiguous() for x in tensors]
    assert not tensors[0].is_contiguous()
    for a, b in zip(results(packed, tensors, 0.2, 9), results(packed, whole, 0.2, 9), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(packed(*tensors[:3], 0.2, 9), packed(*whole[:3], 0.2, 9), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape: tuple[int, int, int]) -> None:
    """Nor who does what: twice with each number."""
    tensors, before, found = numbers(*shape, "heads first"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(packed, tensors, 0.2, None))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_sequence_is_the_same_whatever_lies_beside_it() -> None:
    q, k, v, _ = numbers(4, 2, 32, "heads first")
    whole = packed(q, k, v, 0.2, None).split(LENGTHS)
    for i, part in enumerate(zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)):
        single = attention.packed(*part, 0.2, None, PackedPlan.of([LENGTHS[i]], CPU).runs)
        assert torch.equal(single, whole[i])


def test_a_nan_stays_in_its_sequence_and_large_scores_are_weighed() -> None:
    tensors = numbers(4, 2, 32, "heads first")
    expected = packed(*tensors[:3], 0.2, None).split(LENGTHS)
    for broken in (torch.nan, torch.inf):
        spoilt = tensors[1].clone()
        spoilt[5, 0, 0] = broken
        parts = packed(tensors[0], spoilt, tensors[2], 0.2, None).split(LENGTHS)
        assert parts[1].isnan().any() and torch.equal(parts[4], expected[4])
    sharp = results(packed, tensors, 1e4, None)
    right = results(lambda *a: sequence_by_sequence(by_the_book, *a), [x.double() for x in tensors], 1e4, None)
    torch.testing.assert_close(sharp[0].double(), right[0], rtol=0, atol=1e-3)
    assert all(x.isfinite().all() for x in sharp)


def test_the_first_use_may_be_within_a_checkpointed_layer() -> None:
    """The comparison with PyTorch's saves tensors, too, which a recomputation would miss."""
    tensors = numbers(4, 2, 32, "heads first")
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        assert attention.serves(qkv[0])
        return packed(*qkv, 0.2, None)

    attention._unavailable.cache_clear()
    out = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    for a, b in zip(grads, results(packed, tensors, 0.2, None)[1:], strict=True):
        assert torch.equal(a, b)


def test_differentiating_twice_is_refused() -> None:
    leaves = [x.detach().requires_grad_() for x in numbers(4, 2, 32, "heads first")[:3]]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(packed(*leaves, 0.2, None).sum(), leaves, create_graph=True)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_slots_are_as_exact_as_with_pytorchs_attention(family: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill with copies, chunks, single steps and moves, in float32, against whole forwards in float64."""
    errors, plain = [], family("exact").double().eval()
    for in_c in (True, False):
        with monkeypatch.context() as patch:
            if not in_c:
                patch.setattr(attention, "serves", lambda query: False)
            texts = Texts(FlatCausalLM(family("katds").eval(), VOCABULARY), seed, longest=100)
            texts.feed(0, [texts.tokens(80)], 0)  # more than one block of queries
            for _ in range(40):
                texts.random_operation()
            right = alone(plain, texts.texts())
            errors.append(float((texts.seen() - right).norm() / right.norm()))
    assert len(right) > 20 and errors[0] <= 2 * errors[1] < 1e-4


def test_no_query_is_no_work() -> None:
    q, k, v, _ = (x[:0] for x in numbers(4, 2, 32, "heads first"))
    assert packed_empty(q, k, v).shape == (0, 4, 32)


def packed_empty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention.packed(q, k, v, 0.2, None, PackedPlan.of([], CPU).runs)


def test_wrong_code_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that gets the backward wrong, say."""
    source = next(path for path in build.SOURCES if path.name == "attention.c")
    text = source.read_text()
    (tmp_path / "attention.c").write_text(text.replace("(d[t] - mean) * scale", "(d[t] - mean)"))
    assert (tmp_path / "attention.c").read_text() != text
    (tmp_path / build.HEADER.name).write_text(build.HEADER.read_text())
    others = [path for path in build.SOURCES if path != source]
    monkeypatch.setattr(build, "SOURCES", [*others, tmp_path / "attention.c"])
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, f"-I{build.HEADER.parent}"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (build._library, attention._unavailable):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match="differs from PyTorch's by"):
            assert not attention.serves(torch.zeros(1))
        assert not attention.serves(torch.zeros(1))
    finally:
        for cached in (build._library, attention._unavailable):
            cached.cache_clear()


def test_it_serves_float32_on_the_cpu_only() -> None:
    assert attention.serves(torch.zeros(1))
    assert not attention.serves(torch.zeros(1).double()) and not attention.serves(torch.zeros(1).bfloat16())
    assert not attention.serves(torch.zeros(1, device="meta"))
