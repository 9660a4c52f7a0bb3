"""Packed sequences are what each sequence is alone, gradients and sliding windows included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM
from zoo import random_model

from katds.models.causal import FlatCausalLM, linear
from katds.models.plans import PackedPlan

VOCABULARY = 65
WINDOW = 4
RANDOM = {"initializer_range": 0.2, "sharpness": 2.0}
LENGTHS = [5, 1, 9, 4, 3, 17]


def exact(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: object) -> Any:
    """Attention by the book in float64; transformers' eager one takes its softmax in float32. The window is that of the
    module, the mask is made here: nothing is shared with the code under test."""
    share, length = query.shape[1] // key.shape[1], query.shape[2]
    gap = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    window = (module if hasattr(module, "sliding_window") else module.config).sliding_window or length
    scores = query @ key.repeat_interleave(share, 1).mT * scaling
    weights = scores.masked_fill((gap < 0) | (gap >= window), -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(share, 1)).transpose(1, 2), weights


AttentionInterface.register("exact", exact)


def qwen(attention: str, **extra: Any) -> Any:
    return random_model(1, tied=True, attn_implementation=attention, **RANDOM, **extra)


def qwen_sliding(attention: str, **extra: Any) -> Any:
    """The first layer sees everything, the second a window."""
    options = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, **extra}
    model = qwen(attention, **options)
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, WINDOW]
    return model


def mistral(attention: str, **extra: Any) -> Any:
    """Every layer sees a window."""
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=extra.get("head_dim", 8), sliding_window=WINDOW, attn_implementation=attention,
        initializer_range=0.2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return MistralForCausalLM(config)


FAMILIES = [qwen, qwen_sliding, mistral]


def pack(
    lengths: Sequence[int], device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, PackedPlan]:
    """Sequences of random tokens, and the same laid end to end with their positions and plan."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, VOCABULARY, (n,), generator=generator).to(device) for n in lengths]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    return sequences, torch.cat(sequences), positions, PackedPlan.of(lengths, torch.device(device))


def alone(model: Any, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1], [1], [1, 1], [30]])
def test_packed_sequences_equal_eager_forwards_one_by_one(family: Any, order: list[int]) -> None:
    sequences, ids, positions, plan = pack(order)
    with torch.no_grad():
        packed = FlatCausalLM(family("katds").eval(), VOCABULARY)(ids, positions, plan, linear)
        torch.testing.assert_close(packed, alone(family("eager").eval(), sequences), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_equal_those_of_single_sequences(family: Any) -> None:
    sequences, ids, positions, plan = pack(LENGTHS)
    flat, plain = family("katds").double(), family("exact").double()
    weights = torch.randn(sum(LENGTHS), VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed, expected = FlatCausalLM(flat, VOCABULARY)(ids, positions, plan, linear), alone(plain, sequences)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-9)
    (packed.log_softmax(-1) * weights).sum().backward()
    (expected.log_softmax(-1) * weights).sum().backward()
    for (name, own), (_, other) in zip(flat.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rows_and_vocabulary_cut_the_logits() -> None:
    _, ids, positions, plan = pack(LENGTHS)
    rows = torch.tensor([0, 7, 7, 38])
    padded = qwen("katds", vocabulary=VOCABULARY + 7)
    with torch.no_grad():
        whole = FlatCausalLM(padded, VOCABULARY + 7)(ids, positions, plan, linear)
        part = FlatCausalLM(padded, VOCABULARY)(ids, positions, plan, linear, rows=rows)
    torch.testing.assert_close(part, whole[rows, :VOCABULARY], rtol=0, atol=1e-5)


def test_a_model_that_drops_the_plan_is_an_error() -> None:
    with pytest.raises(AssertionError, match="does not pass keyword arguments"):
        qwen("katds").model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_kernel_is_as_close_as_plain_bfloat16(family: Any) -> None:
    """Values and gradients on CUDA: at most twice the error of the plain bfloat16 model, both against float64."""
    lengths = [5, 1, 300, 64, 33]
    sequences, ids, positions, plan = pack(lengths, "cuda")
    weights = torch.randn(sum(lengths), VOCABULARY, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    results = {}
    for name, attention, dtype in (
        ("kernel", "katds", torch.bfloat16),
        ("plain", "eager", torch.bfloat16),
        ("exact", "exact", torch.float64),
    ):
        model = family(attention, head_dim=64).to(torch.bfloat16).to("cuda", dtype)  # the same rounded weights
        logits = (
            FlatCausalLM(model, VOCABULARY)(ids, positions, plan, linear)
            if name == "kernel"
            else alone(model, sequences)
        )
        (logits.log_softmax(-1) * weights.to(dtype)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results[name] = logits.detach().double(), gradients.double()
    for kernel, plain, true in zip(*results.values(), strict=True):
        assert (kernel - true).norm() <= 2 * (plain - true).norm()
        assert (kernel - true).abs().max() <= 2 * (plain - true).abs().max()
