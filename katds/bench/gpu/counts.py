"""What a case takes at least: FLOPs of its matrix products, and bytes that must be read."""

from __future__ import annotations

from katds.bench.gpu.machine import Shape


def forward_flops(weights: int, tokens: int) -> int:
    """A multiplication and an addition per weight and token."""
    return 2 * weights * tokens


def training_flops(weights: int, tokens: int) -> int:
    """Forward, and backward twice as much: gradients of the inputs and of the weights."""
    return 3 * forward_flops(weights, tokens)


def attention_flops(tokens: int, length: int, heads: int, dim: int) -> float:
    """Causal attention over sequences of `length`, forward and backward: a token sees half of its sequence on average, twice (scores and
    values); the backward pass computes five such products, the scores once more among them."""
    return 3.5 * 4 * tokens * length / 2 * heads * dim


def decode_floor_bytes(weights: int, shape: Shape, batch: int, context: int, itemsize: int) -> int:
    """Read in a token step: every weight once, and keys and values of all that came before."""
    keys = batch * context * shape.layers * shape.kv_heads * shape.dim
    return (weights + 2 * keys) * itemsize
