"""Checkpoints: written whole or not at all, loaded onto the same or another number of ranks.

A checkpoint is a folder `step-N` with DeepSpeed's sharded state, `state.json` (everything else that a resumed run
needs) and the resolved recipe. It is written under another name and renamed when every rank is done.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katds.cli import dump_recipe
from katds.config import Recipe
from katds.core.collective import Collective
from katds.errors import CheckpointError, Interrupted, first_sentence
from katds.parallel.agree import together
from katds.signals import SIGNALS

TAG, _UNIVERSAL = "student", "universal"


@dataclass(frozen=True, slots=True)
class Found:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    world_size: int
    state: dict[str, Any]


@dataclass(slots=True)
class CheckpointStore:
    """Saves and prunes the checkpoints of one run.

    `state` returns the JSON-compatible rest of the run's state, identical on all ranks.
    """

    folder: Path
    engine: Any
    collective: Collective
    keep: int
    recipe: Recipe
    state: Callable[[], dict[str, Any]]

    def save(self, step: int) -> None:
        """Collective: writes `step-N`, then drops all but the newest `keep`."""
        final = self.folder / f"step-{step}"
        partial = self.folder / f"step-{step}.partial"
        if self.collective.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.collective.barrier()
        self.engine.save_checkpoint(str(partial), tag=TAG, save_latest=False)
        self.collective.barrier()
        if self.collective.rank == 0:
            state = {"step": step, "world_size": self.collective.size, **self.state()}
            (partial / "state.json").write_text(json.dumps(state))
            (partial / "config.yaml").write_text(dump_recipe(self.recipe))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(complete_steps(self.folder))[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        self.collective.barrier()


def find_newest(folder: Path) -> Found:
    """The newest complete checkpoint below a run's `checkpoints` folder.

    Raises:
        CheckpointError: there is none, or its state cannot be read.
    """
    steps = complete_steps(folder)
    if not steps:
        raise CheckpointError(
            f"run.resume: there is no complete checkpoint in {folder}. Start without run.resume, or give another run.name."
        )
    newest = folder / f"step-{max(steps)}"
    try:
        state = json.loads((newest / "state.json").read_text())
        return Found(newest, state["step"], state["world_size"], state)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"run.resume: {newest}/state.json cannot be read ({error!r}). Remove {newest} to go on from an older one."
        ) from None


def load(engine: Any, found: Found, collective: Collective) -> None:
    """Collective: model and optimizer state; `engine` was built with load_universal where the number of ranks has changed."""
    universal = found.world_size != collective.size
    tag = _UNIVERSAL if universal else TAG

    def read() -> None:
        path, _ = engine.load_checkpoint(str(found.folder), tag=tag, load_module_strict=True)
        if path is None:
            raise FileNotFoundError(f"nothing under {tag}")

    together(
        collective,
        read,
        lambda error: CheckpointError(
            f"run.resume: DeepSpeed could not read {found.folder / tag} ({type(error).__name__}: {first_sentence(error)}). Remove "
            f"{found.folder} to go on from an older one."
        ),
    )


def make_universal(found: Found, collective: Collective) -> None:
    """Collective: rewrites the sharded state so that any number of ranks can read it. Done by rank 0, once per checkpoint."""
    target = found.folder / _UNIVERSAL
    failure, interrupted = None, False
    if collective.rank == 0 and not target.exists():
        partial = found.folder / f"{_UNIVERSAL}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--input_folder",
            str(found.folder / TAG),
            "--output_folder",
            str(partial),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        interrupted = -done.returncode in SIGNALS  # a scheduler sends them to all processes of a host
        if done.returncode == 0:
            partial.rename(target)
        else:
            failure = done.stderr.strip().splitlines()[-1:] or ["no message"]
    failure, interrupted = collective.gather((failure, interrupted))[0]
    if interrupted:
        raise Interrupted(
            f"{found.folder} was being converted for {collective.size} ranks when a signal came. The same command goes on."
        ).everywhere()
    if failure:
        raise CheckpointError(
            f"run.resume: {found.folder} was written by {found.world_size} ranks and could not be converted for "
            f"{collective.size} ({failure[0]}). Resume on {found.world_size} ranks."
        ).everywhere()


def complete_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder."""
    return [int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / "state.json").exists()]
