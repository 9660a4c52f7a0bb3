"""Live memory of a forward and backward, counted on the meta device: the real operators and autograd, without a number computed.

What a formula would have to know of a model family (which activations its layers keep, which the backward makes) is seen here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from katds.core.teacher_signal import score_tile
from katds.core.types import Field, Need
from katds.models.tiled_head import score_head, tiled_loss
from katds.plan.models import ModelShape, checkpoint_layers
from katds.plan.operators import Results
from katds.plan.signal import Tile

TRACES = 1000  # kept of each kind: the rows of a sweep ask for many of them again


class LiveBytes(TorchDispatchMode):
    """Counts the storages that come into being while it is open, as long as they live.

    Args:
        known: tensors whose storages do not count, such as weights.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = dict.fromkeys(tensor.untyped_storage()._cdata for tensor in known)
        self._results = Results()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._results.of(function, args, kwargs or {})
        for each in result if isinstance(result, list | tuple) else (result,):
            if isinstance(each, torch.Tensor):
                self._see(each)
        return result

    def restart(self) -> None:
        """From now on `peak` is the largest `live` since here."""
        self.peak = self.live

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._seen[key]
        self.live -= size


@dataclass(frozen=True)
class Update:
    """Bytes of one micro-batch's forward and backward, beyond weights and what came with the rollouts.

    kept: activations that the forward leaves for the backward. loss, backward: the most that lives, those included, while the head's
    loss and its gradients are computed, and in the backward; a weight's gradient counts until it is whole (the reduce bucket takes it).
    """

    kept: int
    loss: int
    backward: int


@lru_cache(TRACES)
def trace_update(
    shape: ModelShape, tokens: int, checkpointing: bool, tile: Tile, tile_elements: int | None, teacher: int | None
) -> Update:
    """Of `tokens` packed tokens, all of them scored.

    Args:
        tile: an objective's, as `katds.models.tiled_head.tiled_loss` calls it.
        tile_elements: as there; None: that of a CPU.
        teacher: hidden size of the teacher where the loss reads the whole vocabulary, or None.

    Cost: a second for some thirty layers; more tokens cost more tiles of the head, some seconds for 100 thousand of a large vocabulary.
    """
    model = shape.model()
    base, head = model.model.base_model, model.head
    if checkpointing:
        checkpoint_layers(model)
    model.train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    other = None
    if teacher is not None:
        rows, weight = (torch.empty(n, teacher, dtype=shape.dtype, device="meta") for n in (tokens, shape.vocabulary))
        other = (rows, weight, None)
    known = [*model.parameters(), *model.buffers(), ids, *(other or ())[:2]]
    with LiveBytes(*known) as mode:
        hidden = base(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state[0]
        kept = mode.live

        def loss_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
            return tiled_loss(hidden, weight, bias, 1.0, tile, tile_elements, other)

        mode.restart()
        loss, sums = head(hidden, loss_of)
        del hidden, sums
        at_loss = mode.peak
        mode.restart()
        loss.backward()
        return Update(kept, at_loss, mode.peak)


@lru_cache(TRACES)
def trace_forward(shape: ModelShape, tokens: int) -> int:
    """Bytes at the peak of a forward of `tokens` tokens without gradients, up to the last hidden states, which count."""
    model = shape.model().eval()
    base = model.model.base_model
    ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes(*model.parameters(), *model.buffers(), ids) as mode:
        hidden = base(input_ids=ids, position_ids=ids, use_cache=False)
        del hidden
        return mode.peak


@lru_cache(TRACES)
def trace_score(
    shape: ModelShape, tokens: int, needs: frozenset[Need], top_k: int, teacher_top_k: int, tile_elements: int | None
) -> int:
    """Bytes at the peak of the head of a teacher that scores `tokens` tokens: their hidden states, slab and tiles, and the signal.

    Args: as those of `katds.core.teacher_signal.score_tile`; tile_elements as in `trace_update`.
    """
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=shape.dtype, device="meta")
    actions, ids = (torch.empty(tokens, *more, dtype=torch.int64, device="meta") for more in ((), (top_k,)))

    def tile(logprobs: torch.Tensor, at: slice) -> dict[Field, torch.Tensor]:
        return score_tile(logprobs, actions[at], ids[at], needs, teacher_top_k)

    with LiveBytes(weight, actions, ids) as mode:
        hidden = torch.empty(tokens, shape.hidden, dtype=shape.dtype, device="meta")
        score_head(hidden, weight, None, 1.0, tile, tile_elements)
        return mode.peak
