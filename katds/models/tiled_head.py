"""The output head and whatever follows it, in tiles of rows, so that no [tokens, vocabulary] tensor ever exists.

`tiled_loss` is for the learner, `score_head` for the teacher. Both hand a closure the log-probabilities of one tile.

Invariants:
    The head's weight is used in one call and not needed in the backward pass: under ZeRO-3 one gather for any number
    of tiles, which may differ between ranks.
    Results do not depend on the tile height beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.nn.functional import linear

Key = TypeVar("Key")
LossTile = Callable[[torch.Tensor, slice], Mapping[str, torch.Tensor]]
ScoreTile = Callable[[torch.Tensor, slice], Mapping[Key, torch.Tensor]]

# Elements [rows x vocabulary] of a tile. A tile must be high enough that its products outweigh reading the weight and
# the weight's gradient once per tile, and small enough for the cache. CPU: the fastest of 2^18..2^26, measured on
# vocabularies of 32768 and 151936. CUDA: some 440 rows of 151936, by arithmetic (operations per byte), not yet measured.
CPU_TILE_ELEMENTS = 2**22
CUDA_TILE_ELEMENTS = 2**26


def tiled_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    tile_fn: LossTile,
    tile_elements: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over tiles of a loss on log_softmax((hidden weight^T + bias) / temperature).

    Gradients are computed in the forward pass, tile by tile, while the tile's log-probabilities exist; the backward
    pass only scales them. That is right for any incoming gradient, and for a weight that is also used elsewhere (tied
    embeddings).

    Args:
        hidden: [T, H]; T may be 0: the loss is then a zero with zero gradients, as a rank without tokens needs.
        weight: [V, H] in the type of `hidden`; bias: [V] or None.
        temperature: above 0.
        tile_fn: (log-probabilities [t, V] float32 (float64 from float64 inputs), rows of `hidden` as a slice) ->
            {"loss": scalar that depends on them, ...further scalars}. Called under enable_grad where gradients are
            needed, at least once (with no rows if T = 0). Gradients reach hidden, weight and bias only: other
            tensors in the closure get none. It must not keep the tile, whose memory is used again.
        tile_elements: rows times V of a tile; default by device.

    Returns:
        loss: scalar; divide it after summing over ranks, or scale it, as you like.
        metrics: the detached sums of the other scalars, without "loss".

    Raises:
        ValueError: shapes, types or temperature that do not fit.
        RuntimeError: a backward pass with create_graph=True; there is no second derivative.

    Memory beyond the inputs: a few tiles, and the gradients: [V, H] float32 from here to the backward pass, [T, H].
    Time: that of the plain computation.
    """
    _check(hidden, weight, bias, temperature)
    # needs_input_grad inside a Function is true even under no_grad.
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    height = tile_elements or _default_elements(hidden.device)
    loss, metrics = _TiledLoss.apply(hidden, weight, bias, temperature, tile_fn, height, wanted)
    return loss, metrics


@torch.no_grad()
def score_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    tile_fn: ScoreTile[Key],
    tile_elements: int | None = None,
) -> dict[Key, torch.Tensor]:
    """Per-token results of log_softmax((hidden weight^T + bias) / temperature), without gradients.

    Args:
        hidden: [T, H], T may be 0; weight: [V, H]; bias: [V] or None; temperature: above 0.
        tile_fn: (log-probabilities [t, V] float32, rows of `hidden` as a slice) -> {key: [t, ...]}; as in `tiled_loss`.
        tile_elements: rows times V of a tile; default by device.

    Returns:
        {key: [T, ...]}.

    Raises:
        ValueError: shapes, types or temperature that do not fit.
    """
    _check(hidden, weight, bias, temperature)
    results: dict[Key, torch.Tensor] = {}
    for rows in _tiles(hidden.shape[0], weight.shape[0], tile_elements or _default_elements(hidden.device)):
        for key, tile in tile_fn(head_logprobs(hidden[rows], weight, bias, temperature), rows).items():
            if key not in results:
                results[key] = tile.new_empty((hidden.shape[0], *tile.shape[1:]))
            results[key][rows] = tile
    return results


def head_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """log_softmax of the head's logits / temperature, [t, V]: logits in the inputs' type, the rest float32 or 64."""
    logits = linear(hidden, weight, bias)
    dtype = _wide(logits.dtype)
    if temperature != 1.0:
        # Widened first: dividing bfloat16 logits would round them once more.
        logits = logits.to(dtype) / temperature
    return torch.log_softmax(logits, -1, dtype=dtype)


class _TiledLoss(torch.autograd.Function):
    """See `tiled_loss`. liger-kernel's fused linear losses work the same way; this one takes any loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        temperature: float,
        tile_fn: LossTile,
        tile_elements: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
        totals: dict[str, torch.Tensor] = {}
        for rows in _tiles(hidden.shape[0], weight.shape[0], tile_elements):
            logprobs = head_logprobs(hidden[rows], weight, bias, temperature)
            grad_logits = _run_tile(tile_fn, logprobs, rows, totals, any(wanted))
            if grad_logits is None:
                continue
            grad_logits = (grad_logits.div_(temperature) if temperature != 1.0 else grad_logits).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[rows], tile_elements)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        return totals.pop("loss"), totals

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _metrics: None) -> tuple[torch.Tensor | None, ...]:
        # torch's once_differentiable would let create_graph through and return gradients that look constant.
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled loss cannot be differentiated twice; call backward without create_graph=True")
        grads = tuple(_scaled(grad, grad_loss, ctx.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _run_tile(
    tile_fn: LossTile, logprobs: torch.Tensor, rows: slice, totals: dict[str, torch.Tensor], differentiate: bool
) -> torch.Tensor | None:
    """Adds the tile's sums to `totals`; returns dloss/d(logits/temperature) [t, V] in the memory of `logprobs`."""
    leaf = logprobs.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        sums = tile_fn(leaf, rows)
        if "loss" not in sums:
            raise KeyError(f"the tile's sums lack 'loss'; they hold {sorted(sums)}")
        grad = torch.autograd.grad(sums["loss"], leaf)[0] if differentiate else None
    for key, value in sums.items():
        totals[key] = totals[key] + value.detach() if key in totals else value.detach().clone()
    if grad is None:
        return None
    # Backward of log_softmax: g - p sum(g). `grad` may belong to the closure or be expanded, so it is not written to.
    total = grad.sum(-1, keepdim=True)
    return torch.addcmul(grad, logprobs.exp_(), total, value=-1, out=logprobs)


def _add_product(grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, elements: int) -> None:
    """grad_weight [V, H] += grad_logits [t, V]^T hidden [t, H], with a low-precision product accumulated in float32."""
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden)
        return
    # In blocks of the vocabulary: the product of a low precision needs memory of its own.
    block = max(1, elements // max(1, hidden.shape[1]))
    for start in range(0, grad_weight.shape[0], block):
        grad_weight[start : start + block] += grad_logits[:, start : start + block].t() @ hidden


def _scaled(grad: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """grad * factor, rounded to `dtype` once; a new tensor, since autograd may add to it or run twice."""
    if grad is None:
        return None
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _tiles(tokens: int, vocabulary: int, elements: int) -> Iterator[slice]:
    """Slices that cover the rows in order; one empty slice for no rows, so that keys and shapes are still known."""
    height = max(1, elements // max(1, vocabulary))
    for start in range(0, max(1, tokens), height):
        yield slice(start, min(tokens, start + height))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _default_elements(device: torch.device) -> int:
    return CUDA_TILE_ELEMENTS if device.type == "cuda" else CPU_TILE_ELEMENTS


def _check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> None:
    shapes = f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(f"the head takes hidden [T, H] and weight [V, H] of one type; given {shapes}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"the head's bias must be [V] like the weight; given bias {tuple(bias.shape)} {bias.dtype}, {shapes}"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; the log-probabilities of a greedy policy are undefined, set it above 0"
        )
