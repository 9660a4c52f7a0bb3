"""Decoding: token steps a second against the memory's bandwidth."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.counts import decode_floor_bytes
from katds.bench.gpu.machine import TOP_K, Bench, Case, Shape, columns, multiplied, students
from katds.bench.timing import ratio
from katds.models.causal import FlatCausalLM
from katds.models.graph_step import GraphStep, StaticStep
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep
from katds.rollout.sampling import Sampling, sample_step


def cases(bench: Bench) -> Iterator[Case]:
    for name, shape in students(bench).items():
        model = bench.model(shape)
        for batch in (3,) if bench.toy else (1, 16, 64, 256):
            race = Race(bench, model, shape, batch)
            for title in race.titles:
                yield f"{name}, batch {batch}, {title}", partial(race.row, title)
        del model, race


class Race:
    """Ways to decode, in turn; a row each. `static eager` is what the graph replays, launched operator by operator."""

    def __init__(self, bench: Bench, model: FlatCausalLM, shape: Shape, batch: int) -> None:
        self._bench, self._model, self._shape, self._batch = bench, model, shape, batch
        self._steps = 2 if bench.toy else 16
        self._ways: dict[str, Callable[..., Any]] = {"eager": PlainStep, "static eager": StaticStep}
        if bench.device.type == "cuda":
            self._ways["graph"] = GraphStep
        self.titles = [*self._ways, f"{list(self._ways)[-1]} + sampling"]
        self._rows: dict[str, dict[str, Any]] = {}
        self._errors: dict[str, Exception] = {}

    def row(self, title: str) -> dict[str, Any]:
        """The first one asked for runs them all."""
        if not self._rows and not self._errors:
            try:
                self._run()
            except Exception as error:
                self._errors = dict.fromkeys(self.titles, bare(error)) | self._errors
        if title in self._errors:
            raise self._errors[title]
        return self._rows[title]

    def _run(self) -> None:
        cache = SlotCache(self._batch, self._bench.context + self._steps + 1, self._bench.device)
        held = self._bench.held_gib()
        contenders: dict[str, Callable[[], Any]] = {}
        peaks: dict[str, float | None] = {}
        with torch.inference_mode():
            for title in self.titles:
                try:
                    peaks[title] = self._bench.peak_gib(partial(self._set_up, title, cache, contenders))
                except Exception as error:
                    contenders.pop(title, None)
                    self._errors[title] = bare(error)
            seconds = self._bench.race(contenders, self._steps)
        weights, size = multiplied(self._model), self._bench.dtype.itemsize
        floor = decode_floor_bytes(weights, self._shape, self._batch, self._bench.context, size) / self._bench.bandwidth
        for title, taken in seconds.items():
            row = columns(taken, self._batch)
            row |= {"x floor": row["ms"] / 1e3 / floor, "floor ms": 1e3 * floor}
            if "eager" in seconds and title in self._ways:
                row["speed-up"] = ratio(seconds["eager"], taken).median
            if (peak := peaks[title]) is not None:
                row["GiB"] = held + peak
            self._rows[title] = row

    def _set_up(self, title: str, cache: SlotCache, contenders: dict[str, Callable[[], Any]]) -> None:
        """Makes a contender and runs it once, which is when graphs are recorded."""
        way, _, sampled = title.partition(" + ")
        sampling = Sampling(top_p=0.95) if sampled else None
        step = self._ways[way](self._model, cache)
        contenders[title] = partial(_burst, self._bench, step, self._shape, self._batch, self._steps, sampling)
        contenders[title]()


def _burst(bench: Bench, step: Any, shape: Shape, batch: int, steps: int, sampling: Sampling | None) -> None:
    tokens = torch.zeros(batch, dtype=torch.int64, device=bench.device)
    positions = torch.full((batch,), bench.context, device=bench.device)
    u = torch.full((batch,), 0.5, dtype=torch.float64, device=bench.device)
    for i in range(steps):
        logits = step(tokens, positions, bench.context + i + 1)
        if sampling is not None:
            tokens = sample_step(logits, u, sampling, min(TOP_K, shape.vocabulary)).tokens_S
        positions = positions + 1


def bare(error: Exception) -> Exception:
    """The error without the frames that it came through, which would keep caches and models; they are shown here."""
    traceback.print_exception(error, file=sys.stderr)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
