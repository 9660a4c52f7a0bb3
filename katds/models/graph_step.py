"""Decode steps without launch costs on CUDA: the model's own forward, recorded once per batch size and replayed.

A graph replays fixed addresses and shapes, so tokens and positions are copied into static buffers, the batch is rounded up to
a bucket, and keys are bounded by the cache's length (a varlen kernel reads no more of them than each slot has). Sampling stays
outside: its launches are hidden behind the replay, which the device works through meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from katds.models.causal import FlatCausalLM
from katds.models.native.build import Unavailable
from katds.models.slot_cache import SlotCache, uniform_plan


def bucket(count: int, slots: int) -> int:
    """The batch that stands for `count` live slots: a power of two up to 16, then a multiple of 16, never more than `slots`."""
    rounded = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
    return min(rounded, slots)


class StaticStep:
    """A step on static buffers and a few batch sizes, computed by the model's own forward. Runs on every device.

    Args:
        model: with its weights in place; they must stay where they are as long as the step is used.

    Memory: logits [cache.slots, V] and hidden states [cache.slots, H].

    Rows beyond the live slots are idle: token 0 at position 0. Their keys go to position 0 of free slots (live slots are a
    prefix), and whoever is seated there next writes his own position 0, by prefill or first step, before anything sees it.
    """

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        weight, _ = model.head_parameters()
        with torch.inference_mode(False):  # written in either mode later on
            self._tokens = torch.zeros(cache.slots, dtype=torch.int64, device=weight.device)
            self._positions = torch.zeros_like(self._tokens)
            self._slots = torch.arange(cache.slots, device=weight.device)
            self._logits, self._hidden = (
                torch.zeros(cache.slots, width, dtype=weight.dtype, device=weight.device) for width in weight.shape
            )
        self._model, self._cache = model, cache
        self._live = 0  # rows that may hold something else than an idle token

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits [n, V] of tokens [n] at positions [n]; `longest` is not needed."""
        live = tokens.shape[0]
        self._tokens[:live].copy_(tokens)
        self._positions[:live].copy_(positions)
        if live < self._live:
            self._tokens[live : self._live].zero_()
            self._positions[live : self._live].zero_()
        self._live = live
        self._run(bucket(live, self._cache.slots))
        return self._logits[:live]

    @property
    def hidden(self) -> torch.Tensor:
        """[n, H] of the last call."""
        return self._hidden[: self._live]

    def _run(self, size: int) -> None:
        """Computes the first `size` rows."""
        self._forward(size)

    def _forward(self, size: int) -> None:
        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            self._hidden[:size].copy_(hidden)
            out = self._logits[:size]
            if bias is None:
                torch.mm(hidden, weight.t(), out=out)
            else:
                torch.addmm(bias, hidden, weight.t(), out=out)

        positions = self._positions[:size]
        plan = uniform_plan(self._cache, self._slots[:size], positions, self._cache.length)
        self._model(self._tokens[:size], positions, plan, head, cache=self._cache)


class GraphStep(StaticStep):
    """A `StaticStep` that replays CUDA graphs, one per batch size, recorded when it first comes up.

    Memory: the activations of the largest batch so far, in a pool that all graphs share. The allocator takes it back once the
    step is gone.

    Raises:
        Unavailable: the device is no GPU; on a call: the model's forward cannot be recorded.
    """

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        if cache.device.type != "cuda":
            raise Unavailable(f"the device is {cache.device.type}")
        super().__init__(model, cache)
        self._graphs: dict[int, Any] = {}
        self._stream = torch.cuda.Stream(cache.device)
        self._pool = torch.cuda.graph_pool_handle()

    def _run(self, size: int) -> None:
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            # Eagerly first: what this allocates, such as the cache's buffers, outlives the graph. The recording runs nothing.
            self._forward(size)
            self._graphs[size] = self._recorded(size)

    def _recorded(self, size: int) -> Any:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._cache.device)
        try:
            # The stream's first use of a library makes workspaces, which must not lie in the graph's pool. A model that looks
            # at the device (dynamic rotary embeddings) fails here, in order; a recording that fails may leave the device unusable.
            self._stream.wait_stream(here)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.cuda.stream(self._stream):
                    self._forward(size)
            finally:
                torch.cuda.set_sync_debug_mode(before)
            here.wait_stream(self._stream)
            # thread_local: NCCL's watchdog looks at events from a thread of its own meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                self._forward(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Unavailable(
                f"its forward cannot be recorded as a CUDA graph ({str(error).strip().partition(chr(10))[0]})"
            ) from error
        return graph
