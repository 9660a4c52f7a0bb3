"""Decoding: token steps a second against the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.machine import TOP_K, Bench, Case, Shape, multiplied, students
from katds.models.causal import FlatCausalLM
from katds.models.graph_step import GraphStep, StaticStep
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep
from katds.rollout.sampling import Sampling, sample_step


def cases(bench: Bench) -> Iterator[Case]:
    for name, shape in students(bench).items():
        model = bench.model(shape)
        for batch in (3,) if bench.toy else (1, 16, 64, 256):
            yield from _decode_cases(bench, f"{name}, batch {batch}", model, shape, batch)
        del model


def _decode_cases(bench: Bench, name: str, model: FlatCausalLM, shape: Shape, batch: int) -> Iterator[Case]:
    """Contenders in one race; a row each. `static eager` is what the graph replays, launched operator by operator."""
    steps = 2 if bench.toy else 16
    ways: dict[str, Any] = {"eager": PlainStep, "static eager": StaticStep}
    if bench.device.type == "cuda":
        ways["graph"] = GraphStep
    fastest = list(ways)[-1]
    seconds: dict[str, float] = {}
    failed: dict[str, Exception] = {}

    def race() -> None:
        cache = SlotCache(batch, bench.context + steps + 1, bench.device)
        contenders = {}
        with torch.inference_mode():
            for title in titles:
                way, _, sampled = title.partition(" + ")
                sampling = Sampling(top_p=0.95) if sampled else None
                try:
                    run = partial(_burst, bench, ways[way](model, cache), shape, batch, steps, sampling)
                    run()
                    contenders[title] = run
                except Exception as error:
                    failed[title] = error
            seconds.update(bench.race(contenders, steps))

    weights = multiplied(model) * bench.dtype.itemsize
    keys = 2 * batch * bench.context * shape.layers * shape.kv_heads * shape.dim * bench.dtype.itemsize
    floor = (weights + keys) / bench.bandwidth

    def row(title: str) -> dict[str, Any]:
        if not seconds:
            race()
        if title in failed:
            raise failed[title]
        s = seconds[title]
        return {"ms": 1e3 * s, "tokens/s": batch / s, "x floor": s / floor, "floor ms": 1e3 * floor}

    titles = [*ways, f"{fastest} + sampling"]
    for title in titles:
        yield f"{name}, {title}", partial(row, title)


def _burst(bench: Bench, step: Any, shape: Shape, batch: int, steps: int, sampling: Sampling | None) -> None:
    tokens = torch.zeros(batch, dtype=torch.int64, device=bench.device)
    positions = torch.full((batch,), bench.context, device=bench.device)
    u = torch.full((batch,), 0.5, dtype=torch.float64, device=bench.device)
    for i in range(steps):
        logits = step(tokens, positions, bench.context + i + 1)
        if sampling is not None:
            tokens = sample_step(logits, u, sampling, min(TOP_K, shape.vocabulary)).tokens_S
        positions = positions + 1
