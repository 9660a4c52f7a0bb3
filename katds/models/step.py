"""How the forwards of a rollout phase are computed: decode steps (one token in each of the slots 0 .. n-1, to logits), prompts, and the
teacher's chunks.

A forward costs some forty operator calls per layer. Where the arithmetic is small next to them, they are left out: on the CPU by
C code, on CUDA, for decode steps, by graphs. Which way serves a model is found out once, by comparing its logits with those of the
model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from katds.models.causal import FlatCausalLM, Forward, linear
from katds.models.graph_step import GraphStep
from katds.models.native.build import Unavailable
from katds.models.native.forward import NativeForward, NativeStep
from katds.models.slot_cache import SlotCache, ragged_plan, uniform_plan

CHECK_SLOTS, CHECK_LIVE, CHECK_TOKENS = 4, 3, 6  # one slot is free, so that an idle row rides along


class Step(Protocol):
    """Writes the keys of tokens [n] at positions [n] (int64) and returns their logits [n, V]; `longest` is the largest
    position + 1. The tensor is overwritten by the next call, and so is `hidden` [n, H], the states that the head has read."""

    @property
    def hidden(self) -> torch.Tensor: ...

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor: ...


class PlainStep:
    """The model's own forward, operator by operator."""

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        self._model, self._cache = model, cache
        self._slots = torch.arange(cache.slots, device=cache.device)
        self.hidden = torch.empty(0)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        plan = uniform_plan(self._cache, self._slots[: tokens.shape[0]], positions, longest)
        logits: torch.Tensor = self._model(tokens, positions, plan, self._head, cache=self._cache)
        return logits

    def _head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.hidden = hidden
        return linear(hidden, weight, bias)


@dataclass(frozen=True, slots=True)
class Made:
    """A cache and the step that writes to it, and where the weights lay when it was made."""

    cache: SlotCache
    step: Step
    model: FlatCausalLM
    addresses: tuple[int, ...]

    @property
    def forward(self) -> Forward:
        """For prompts."""
        return self.step.forward if isinstance(self.step, NativeStep) else self.model

    def serves(self, model: FlatCausalLM, slots: int, length: int) -> bool:
        fits = self.cache.slots >= slots and self.cache.length >= length
        return fits and self.model is model and self.addresses == _addresses(model)


class StepMaker:
    """Makes the cache and the step of one model, phase after phase.

    Args:
        fast: leave operator calls out where that is possible.
        keep: hold on to cache and step between phases, CUDA graphs included, as long as they fit and the weights have not moved.
            Their memory is then never given back; a step may hold on to the weights, too.
        say: told once why operator calls cannot be left out.
    """

    def __init__(self, fast: bool, keep: bool, say: Callable[[str], None]) -> None:
        self._fast, self._keep, self._say = fast, keep, say
        self._checked = False
        self._kept: Made | None = None

    def __call__(self, model: FlatCausalLM, slots: int, length: int, device: torch.device) -> Made:
        """For a model whose weights are in place. The cache may be larger than asked for."""
        made, self._kept = self._kept, None
        if made is not None and not made.serves(model, slots, length):
            # Phases differ in size; with the largest so far, the steps soon stop being made anew.
            slots, length = max(slots, made.cache.slots), max(length, made.cache.length)
            made = None  # freed before the next one is allocated
        if made is None:
            cache = SlotCache(slots, length, device)
            made = Made(cache, self._step(model, cache), model, _addresses(model))
        if self._keep:
            self._kept = made
        return made

    def _step(self, model: FlatCausalLM, cache: SlotCache) -> Step:
        way: Callable[[FlatCausalLM, SlotCache], Step] = GraphStep if cache.device.type == "cuda" else NativeStep
        if not self._fast:
            return PlainStep(model, cache)
        try:
            if not self._checked:
                check(way, model)
                if way is NativeStep:
                    check_forward(model)  # for prompts
                self._checked = True
            return way(model, cache)
        except Unavailable as reason:
            self._fast = False
            self._say(f"decoding goes through transformers, operator by operator: {reason}")
            return PlainStep(model, cache)


class ForwardMaker:
    """Finds the fastest forward of a model that reads, such as the teacher.

    Args: as those of `StepMaker`.
    """

    def __init__(self, fast: bool, say: Callable[[str], None]) -> None:
        self._fast, self._say = fast, say
        self._checked = False

    def __call__(self, model: Forward, cache: SlotCache) -> Forward:
        """For a model whose weights are in place, and for this cache. An engine that gathers its weights is returned as it is."""
        if not self._fast or not isinstance(model, FlatCausalLM) or cache.device.type != "cpu":
            return model
        try:
            if not self._checked:
                check_forward(model)
                self._checked = True
            return NativeForward(model, cache)
        except Unavailable as reason:
            self._fast = False
            self._say(f"the teacher reads through transformers, operator by operator: {reason}")
            return model


@torch.no_grad()
def check(way: Callable[[FlatCausalLM, SlotCache], Step], model: FlatCausalLM) -> None:
    """Compares a few steps with the model's own forward. Raises Unavailable if they differ by more than rounding."""
    weight, _ = model.head_parameters()
    mine, own = (SlotCache(CHECK_SLOTS, CHECK_TOKENS + 1, weight.device) for _ in range(2))
    step, plain = way(model, mine), PlainStep(model, own)
    for at in range(CHECK_TOKENS):
        tokens = torch.tensor([(7 * at + 4 * row + 1) % weight.shape[0] for row in range(CHECK_LIVE)]).to(weight.device)
        positions = torch.full((CHECK_LIVE,), at, device=weight.device)
        _compare(step(tokens, positions, at + 1), plain(tokens, positions, at + 1))


@torch.no_grad()
def check_forward(model: FlatCausalLM) -> None:
    """Compares two forwards of several tokens per slot, of which one slot gets its first ones from another, with the model's own.
    Raises Unavailable if they differ by more than rounding."""
    weight, _ = model.head_parameters()
    mine, own = (SlotCache(CHECK_SLOTS, CHECK_TOKENS + 1, weight.device) for _ in range(2))
    forward = NativeForward(model, mine)
    for starts, counts, copies in (([0, 0], [3, 1], [(0, 2, 3)]), ([3, 1, 3], [2, 2, 2], [])):
        tokens = torch.arange(sum(counts)) * 7 % weight.shape[0]
        logits = []
        for way, cache in ((forward, mine), (model, own)):
            plan, positions = ragged_plan(cache, 0, starts, counts, 0, copies)
            logits.append(way(tokens, positions, plan, linear, cache=cache))
        _compare(*logits)


def _compare(logits: torch.Tensor, expected: torch.Tensor) -> None:
    difference = logits.float() - expected.float()
    # By the largest row: a token may have no logits at all, such as one whose embedding is zero.
    error = float(difference.norm(dim=-1).max() / expected.float().norm(dim=-1).max())
    if not error <= tolerance(expected.dtype):  # NaN too
        raise Unavailable(f"the fast way's logits differ from the model's own by {error:.1g} of their size")


def tolerance(dtype: torch.dtype) -> float:
    """Of the logits' norm. Rounding each of 2 x layers sums to `dtype` shifts them by some sqrt(2 layers) eps / 4, a few eps for
    the deepest models; a wrong formula shifts them by some 1e-1 and more, idle or stale rows by 1."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _addresses(model: FlatCausalLM) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in model.parameters())
