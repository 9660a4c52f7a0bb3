"""Whole steps, under ZeRO-3 on one rank."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from katds.bench.gpu.machine import GIB, Bench, Case, columns
from katds.bench.ranks import on_ranks
from katds.bench.recipes import recipe
from katds.bench.workloads import WORKLOADS, build

WAYS: list[dict[str, Any]] = [  # sections `rollout`
    {"weights": "view", "fast_decode": True}, {"weights": "view", "fast_decode": False},
    {"weights": "copy", "fast_decode": False}, {"weights": "copy", "fast_decode": True},
    {"weights": "copy", "fast_decode": True, "overlap": True},
]  # fmt: skip


def cases(bench: Bench) -> Iterator[Case]:
    for way in WAYS[3:4] if bench.toy else WAYS:
        title = ", ".join(f"{name} {value}" for name, value in way.items())
        yield f"{'smoke' if bench.toy else 'small'} models, {title}", partial(_whole, bench, way)


def _whole(bench: Bench, way: dict[str, Any]) -> dict[str, Any]:
    arguments = ("smoke" if bench.toy else "small", way, 1 if bench.toy else 4, str(bench.dtype))
    if bench.toy and bench.device.type == "cpu":
        return whole_steps(*arguments)  # a process of its own takes longer than the rest of the toy run
    row: dict[str, Any] = on_ranks(1, whole_steps, *arguments)[0]
    return row


def whole_steps(shape: str, way: dict[str, Any], steps: int, dtype: str) -> dict[str, Any]:
    """Collective: training steps through `katds.run`, after one that is not counted; and the collectives' self-test."""
    from katds.config import Recipe
    from katds.parallel.world import start_world
    from katds.run import open_run

    workload, world = WORKLOADS[shape], start_world()
    device = world.device
    rows = torch.arange(6.0, device=device).view(3, 2)
    back = world.collective.exchange(rows, [3] * world.size, [3] * world.size)  # NCCL on a GPU
    assert torch.equal(back, rows), f"exchange gave {back.tolist()}"
    assert world.collective.sum(torch.ones(2)).tolist() == [world.size] * 2 and world.collective.gather(world.rank) == [
        0
    ]
    said = io.StringIO()  # standard output is for the table
    with tempfile.TemporaryDirectory() as name, redirect_stdout(said):
        folder = build(workload, Path(name), workload.rollouts * (steps + 1))
        base = {
            "data": {"chat_template": False, "answer_column": None},
            "rollout": {
                "prompts_per_step": workload.rollouts, "max_new_tokens": workload.new_tokens, "slots": workload.rollouts,
                "chunk_tokens": 32, **way,
            },
        }  # fmt: skip
        precision = "bf16" if dtype == "torch.bfloat16" else "fp32"
        made = recipe(
            base, folder, folder / "teacher", "step", {"kind": "never"}, steps + 1, gather="phase", precision=precision
        )
        run = open_run(Recipe.model_validate(made))

        def settle() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            world.collective.barrier()

        seconds = []
        for number in range(steps + 1):
            settle()
            start = time.perf_counter()
            run.trainer.step(number)
            settle()
            seconds.append(time.perf_counter() - start)
        run.monitor.close()
    memory = torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else None
    hear(said.getvalue(), device)
    return {**columns(seconds[1:], run.trainer.engine.stats.tokens), "GiB": memory}


def hear(said: str, device: torch.device) -> None:
    """Graphs that do not come about are a failure on a GPU; on a CPU it is told that there is no C code."""
    for line in said.splitlines():
        if "operator by operator" in line:
            if device.type == "cuda":
                raise RuntimeError(line)
            print(f"gpu: {line}", file=sys.stderr, flush=True)
