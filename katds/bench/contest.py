"""What each rank of a contest does: build the models, open the runs of katds, and let TRL train with katds's steps in between.

Importing it is cheap.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from katds.bench.workloads import Task, Workload, build

if TYPE_CHECKING:
    from katds.run import Run


class Step(NamedTuple):
    """One step, of all ranks."""

    seconds: float
    mean_tokens: float  # of a response
    loss: float


@dataclass(frozen=True)
class Contest:
    """What one process group runs: TRL, and katds by these recipes.

    Args:
        workload: to be built first, beside the prompts.
        rules: the state that a recipe's stop rule starts from.
    """

    task: Task
    recipes: dict[str, dict[str, Any]]
    workload: Workload | None = None
    rules: dict[str, Any] = field(default_factory=dict)


def race(contest: Contest) -> dict[str, list[Step]]:
    """Collective: TRL and katds in turns; the steps of "trl" and of each recipe."""
    silence()
    import torch

    from katds.bench.trl_peer import train
    from katds.parallel.agree import on_main
    from katds.parallel.world import start_world

    world, task = start_world(), contest.task
    if (workload := contest.workload) is not None:
        count = task.rollouts * world.size * task.steps
        on_main(world.collective, lambda: build(workload, task.prompts.parent, count, precision=task.precision))
    # katds first: what TRL leaves behind in the process (DeepSpeed's linear, the global ZeRO-3 flag of transformers) is
    # then what it has alone.
    runs = open_runs(contest.recipes, contest.rules)
    steps: dict[str, list[Step]] = {name: [] for name in runs}

    def settle() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        world.collective.barrier()

    def between(step: int) -> None:
        for name in rotated(list(runs), step):
            run = runs[name]
            settle()
            start = time.perf_counter()
            run.trainer.step(step)
            settle()
            seconds = time.perf_counter() - start
            last = run.monitor.last
            steps[name].append(Step(seconds, last["rollout/length_mean"], last["loss/total"]))
        if world.is_main:
            say(f"step {step + 1} of {task.steps} done")

    return {"trl": [Step(*step) for step in train(task, settle, between)], **steps}


def rotated(names: list[str], step: int) -> list[str]:
    """Every name comes first in its turn: what a place in the round costs, all pay alike."""
    first = step % len(names)
    return names[first:] + names[:first]


def train_first(recipe: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """Collective: the first steps of a run; writes the student and returns the stop rule's state."""
    silence()
    run = _open(recipe)
    for step in range(steps):
        run.trainer.step(step)
    run.student.export(folder, run.inputs.tokenizer)
    return run.trainer.rule.state_dict()


def open_runs(recipes: dict[str, dict[str, Any]], rules: dict[str, Any]) -> dict[str, Run]:
    """Collective: a run of each recipe; `rules` has the states that some of their stop rules start from."""
    runs = {name: _open(recipe) for name, recipe in recipes.items()}
    for name, state in rules.items():
        runs[name].trainer.rule.load_state_dict(state)
    return runs


def _open(recipe: dict[str, Any]) -> Run:
    from katds.config import Recipe
    from katds.run import open_run

    return open_run(Recipe.model_validate(recipe))


def silence() -> None:
    """Of a rank only errors are shown: standard output is for the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(line: str) -> None:
    print(f"peers: {line}", file=sys.stderr, flush=True)
