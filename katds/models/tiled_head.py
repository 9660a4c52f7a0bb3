"""The output head and whatever follows it, a few rows at a time, so that no [tokens, vocabulary] tensor ever exists.

`tiled_loss` is for the learner, `score_head` for the teacher. Both hand a closure the log-probabilities of one tile.

A matrix product reads the weight, and its gradient, once, however few rows it has; all else takes a dozen passes over
its rows. So products work on slabs of some hundred rows, and what lies between them on tiles of a slab, which fit the cache.

Invariants:
    The head's weight is used in one call and not needed in the backward pass: under ZeRO-3 one gather for any number
    of tiles, which may differ between ranks.
    Results do not depend on the height of tiles and slabs beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import linear

Key = TypeVar("Key")
LossTile = Callable[..., Mapping[str, torch.Tensor]]
ScoreTile = Callable[[torch.Tensor, slice], Mapping[Key, torch.Tensor]]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # hidden [T, H], weight [V, H], bias [V]

# Elements [rows x vocabulary] of a tile and rows of a slab. CPU, measured on vocabularies of 2048 to 151936 with hidden
# sizes of 128 to 1024 (`launch/bench.py loss`): 2^18 to 2^21 are equal within 3%, 2^22 loses 10% to page faults; 256
# rows reach 95% of the products' rate in float32 and bfloat16, 64 rows 80%; small vocabularies take more. CUDA: some 440 rows of 151936, by
# arithmetic (operations per byte), not yet measured.
CPU_TILE_ELEMENTS = 2**19
CPU_SLAB_ROWS, CPU_SLAB_TILES = 256, 8  # whichever is more
CUDA_TILE_ELEMENTS = 2**26
# Of a low-precision product on its way to the float32 gradient: small enough to stay in the cache.
PRODUCT_ELEMENTS = 2**19


class _Heights(NamedTuple):
    """Rows of a tile, and of a slab, which holds at least one tile."""

    tile: int
    slab: int


def tiled_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    tile_fn: LossTile,
    tile_elements: int | None = None,
    teacher: Rows | None = None,
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
        tile_elements: rows times V of a tile, which is then the slab too; default by device.
        teacher: hidden [T, H'], weight [V, H'] and bias of a second head: tile_fn gets its log-probabilities [t, V] at
            the same rows and temperature, without gradients, as a third argument. A closure that multiplied by that
            weight itself would read it once per tile.

    Returns:
        loss: scalar; divide it after summing over ranks, or scale it, as you like.
        metrics: the detached sums of the other scalars, without "loss".

    Raises:
        ValueError: shapes, types or temperature that do not fit.
        RuntimeError: a backward pass with create_graph=True; there is no second derivative.

    Memory beyond the inputs: a slab per head in its type, a few tiles, and the gradients: [V, H] float32 from here to
    the backward pass, [T, H]. Time: that of the plain computation.
    """
    _check(hidden, weight, bias, temperature)
    if teacher is not None:
        _check(*teacher, temperature)
        if (len(teacher[0]), len(teacher[1])) != (len(hidden), len(weight)):
            raise ValueError(
                f"the teacher has {len(teacher[0])} rows and {len(teacher[1])} words, the student {len(hidden)} rows and "
                f"{len(weight)} words; they must agree"
            )
    # needs_input_grad inside a Function is true even under no_grad.
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    heights = _heights(hidden, weight, tile_elements)
    loss, metrics = _TiledLoss.apply(hidden, weight, bias, temperature, tile_fn, heights, teacher, wanted)
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
    heights = _heights(hidden, weight, tile_elements)
    project = _Projector((hidden, weight, bias), heights.slab)
    for slab in _slices(hidden.shape[0], heights.slab):
        logits = project(slab)
        for rows in _slices(logits.shape[0], heights.tile):
            at = slice(slab.start + rows.start, slab.start + rows.stop)
            for key, tile in tile_fn(_logprobs(logits[rows], temperature), at).items():
                if key not in results:
                    results[key] = tile.new_empty((hidden.shape[0], *tile.shape[1:]))
                results[key][at] = tile
    return results


def head_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """log_softmax of the head's logits / temperature, [t, V]: logits in the inputs' type, the rest float32 or 64."""
    return _logprobs(linear(hidden, weight, bias), temperature)


def _logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    # Widened first: dividing bfloat16 logits would round them once more, and log_softmax widens slowly.
    logits = logits.to(_wide(logits.dtype))
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, -1)


class _Projector:
    """Logits of one slab after the other, [t, V] in the type of the inputs, always in the same memory.

    Fresh memory for every slab would cost a page fault per 4 KiB, twice the time of the softmax.
    """

    def __init__(self, head: Rows, height: int) -> None:
        self._hidden, weight, self._bias = head
        self._weight = weight.t()
        self._memory = weight.new_empty(min(height, self._hidden.shape[0]), weight.shape[0])

    def __call__(self, slab: slice) -> torch.Tensor:
        out = self._memory[: slab.stop - slab.start]
        if self._bias is None:
            return torch.mm(self._hidden[slab], self._weight, out=out)
        return torch.addmm(self._bias, self._hidden[slab], self._weight, out=out)


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
        heights: _Heights,
        teacher: Rows | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        wide = _wide(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
        totals: dict[str, torch.Tensor] = {}
        project = _Projector((hidden, weight, bias), heights.slab)
        project_teacher = _Projector(teacher, heights.slab) if teacher is not None else None
        for slab in _slices(hidden.shape[0], heights.slab):
            logits = project(slab)
            others = (project_teacher(slab),) if project_teacher is not None else ()
            for rows in _slices(logits.shape[0], heights.tile):
                at = slice(slab.start + rows.start, slab.start + rows.stop)
                extra = tuple(_logprobs(other[rows], temperature) for other in others)
                _run_tile(tile_fn, logits[rows], at, extra, temperature, totals, any(wanted))
            # From here on `logits` holds the gradient.
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[slab])
            if grad_weight is not None:
                _add_product(grad_weight, logits, hidden[slab], first=slab.start == 0)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden.dtype
        return totals.pop("loss"), totals

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _metrics: None) -> tuple[torch.Tensor | None, ...]:
        # torch's once_differentiable would let create_graph through and return gradients that look constant.
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled loss cannot be differentiated twice; call backward without create_graph=True")
        grads = tuple(_scaled(grad, grad_loss, ctx.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _run_tile(
    tile_fn: LossTile,
    logits: torch.Tensor,
    at: slice,
    extra: tuple[torch.Tensor, ...],
    temperature: float,
    totals: dict[str, torch.Tensor],
    differentiate: bool,
) -> None:
    """Adds the tile's sums to `totals`; where gradients are needed, dloss/dlogits [t, V] takes the place of `logits`."""
    logprobs = _logprobs(logits, temperature)
    leaf = logprobs.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        sums = tile_fn(leaf, at, *extra)
        if "loss" not in sums:
            raise KeyError(f"the tile's sums lack 'loss'; they hold {sorted(sums)}")
        grad = torch.autograd.grad(sums["loss"], leaf)[0] if differentiate else None
    for key, value in sums.items():
        totals[key] = totals[key] + value.detach() if key in totals else value.detach().clone()
    if grad is None:
        return
    # Backward of log_softmax: g - p sum(g). `grad` may belong to the closure or be expanded, so it is not written to.
    total = grad.sum(-1, keepdim=True)
    result = logits if logits.dtype == logprobs.dtype else logprobs
    torch.addcmul(grad, logprobs.exp_(), total, value=-1, out=result)
    if temperature != 1.0:
        result.div_(temperature)
    if result is not logits:
        logits.copy_(result)


def _add_product(grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
    """grad_weight [V, H] = or += grad_logits [t, V]^T hidden [t, H], with a low-precision product accumulated in float32."""
    if grad_weight.dtype == hidden.dtype:
        torch.addmm(grad_weight, grad_logits.t(), hidden, beta=0 if first else 1, out=grad_weight)
        return
    # In blocks of the vocabulary: the product of a low precision needs memory of its own.
    elements = PRODUCT_ELEMENTS if hidden.device.type == "cpu" else CUDA_TILE_ELEMENTS
    block = max(1, elements // max(1, hidden.shape[1]))
    for start in range(0, grad_weight.shape[0], block):
        part, product = grad_weight[start : start + block], grad_logits[:, start : start + block].t() @ hidden
        if first:
            part.copy_(product)
        else:
            part += product


def _scaled(grad: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """grad * factor, rounded to `dtype` once; a new tensor, since autograd may add to it or run twice."""
    if grad is None:
        return None
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _slices(rows: int, height: int) -> Iterator[slice]:
    """Slices that cover the rows in order; one empty slice for no rows, so that keys and shapes are still known."""
    for start in range(0, max(1, rows), height):
        yield slice(start, min(rows, start + height))


def _heights(hidden: torch.Tensor, weight: torch.Tensor, tile_elements: int | None) -> _Heights:
    on_gpu = hidden.device.type == "cuda"
    tile = max(1, (tile_elements or (CUDA_TILE_ELEMENTS if on_gpu else CPU_TILE_ELEMENTS)) // max(1, weight.shape[0]))
    return _Heights(tile, tile if tile_elements or on_gpu else max(CPU_SLAB_TILES * tile, CPU_SLAB_ROWS))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
