"""A real run on two ranks, and how much memory it took: the peak of a rank's resident memory.

A process is a few hundred MiB large before any weight counts (libraries, their threads and buffers). What a run on models of next to no
size takes, measured in the same way, is that part.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from katds.bench.ranks import on_ranks
from katds.bench.recipes import recipe
from katds.bench.workloads import Workload, build
from katds.config import Recipe

# Freed memory goes back to the system at once; by default glibc keeps some of it, which no plan can foresee.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def recipe_of(folder: Path, workload: Workload, steps: int, gather: str = "once", **changes: dict[str, Any]) -> Recipe:
    """On models and prompts made below `folder`, for two ranks."""
    count = 2 * workload.rollouts
    if not (folder / "student").exists():
        build(workload, folder, count * steps)
    base = {
        "data": {"chat_template": False, "answer_column": None},
        "rollout": {
            "prompts_per_step": count, "max_new_tokens": workload.new_tokens, "slots": workload.rollouts, "chunk_tokens": 32,
            "top_p": 1.0,
        },
        "checkpoint": {"every": 0, "export": False},
    }  # fmt: skip
    made = recipe(base, folder, folder / "teacher", "measured", {"kind": "never"}, steps, gather=gather)
    return Recipe.model_validate({key: made.get(key, {}) | changes.get(key, {}) for key in {**made, **changes}})


def peak_bytes(recipe: Recipe, ranks: int = 2, trained: bool = True) -> int:
    """Of the rank that takes the most, from its start to the end of training, or before its first step."""
    before = {name: os.environ.get(name) for name in TIDY}
    os.environ.update(TIDY)
    try:
        return max(on_ranks(ranks, _on_rank, recipe.model_dump(mode="json"), trained))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _on_rank(recipe: dict[str, Any], trained: bool) -> int:
    from katds.run import open_run

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run = open_run(Recipe.model_validate(recipe))
    for step in range(run.inputs.steps if trained else 0):
        run.trainer.step(step)
    return resident("VmHWM")


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
