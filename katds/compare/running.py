"""Makes the runs of a comparison one after another, each in processes of its own, and goes on where it broke off."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from katds.bench.report import commit, processor
from katds.cli import dump_recipe
from katds.compare.cells import Run
from katds.errors import ConfigError

# recipe file, log file -> exit code
Launch = Callable[[Path, Path], int]
Say = Callable[[str], None]

PATIENCE_SECONDS = 10.0
OF_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def make_runs(runs: Sequence[Run], launch: Launch, ranks: int, say: Say) -> dict[str, str]:
    """Makes what is not done yet, with a record (`Maker`) of what by. `ranks` are those that `launch` starts. Returns why runs are
    missing, by name: one that fails does not stop the others."""
    missing: dict[str, str] = {}
    todo = [run for run in runs if not run.is_done]
    for i, run in enumerate(todo, 1):
        label = f"[{i}/{len(todo)}] {run.name}"
        if run.lacks is not None:
            missing[run.name] = f"it needs {run.lacks}, which is not done"
            say(f"{label}: left out, {missing[run.name]}")
            continue
        start = time.monotonic()
        log = run.recipe.run.folder / "logs" / f"{run.name}.log"
        recipe = _prepare(run, say, label)
        if (run.folder / "checkpoints").exists() and not makers(run):
            record_maker(run, Maker("unknown", ranks))  # who began it
        record_maker(run, Maker(commit(), ranks, processor()))
        code = launch(recipe, _made(log))
        if code == 0 and run.is_done:
            say(f"{label}: {_found(run)}, after {time.monotonic() - start:.0f} s")
        else:
            missing[run.name] = f"exit code {code}: {_reason(log)} ({log})"
            say(f"{label}: failed, {missing[run.name]}")
    return missing


def _prepare(run: Run, say: Say, label: str) -> Path:
    """The recipe file of a run that goes on from its checkpoint or, without one, starts anew."""
    going_on = any(re.fullmatch(r"step-\d+", path.name) for path in (run.folder / "checkpoints").glob("*"))
    if run.folder.exists() and not going_on:
        if any(run.folder.iterdir()) and not (run.folder / "config.yaml").exists():
            raise ConfigError(
                f"folder: {run.folder} holds something that is no run. Remove it, or give another folder."
            )
        shutil.rmtree(run.folder)
    if not going_on:
        _makers_file(run).unlink(missing_ok=True)
    say(f"{label}: {'goes on' if going_on else 'starts'}")
    recipe = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"resume": going_on})})
    file = _made(run.recipe.run.folder / "recipes" / f"{run.name}.yaml")
    file.write_text(dump_recipe(recipe))
    return file


class Maker(NamedTuple):
    """What a run, or a part of it that was gone on with later, was made by. `commit`: see `katds.bench.report.commit`."""

    commit: str
    ranks: int
    processor: str = ""  # as `katds.bench.report.processor` names it; of runs from before this was recorded, nothing


def record_maker(run: Run, maker: Maker) -> None:
    """Adds to what the run was made by so far: FOLDER/made/NAME.jsonl, a line for each start."""
    with _made(_makers_file(run)).open("a") as file:
        file.write(json.dumps(maker._asdict()) + "\n")


def makers(run: Run) -> list[Maker]:
    """All that the run was made by, in order, each once; none of a run from before this was recorded."""
    file = _makers_file(run)
    lines = file.read_text().splitlines() if file.exists() else []
    return list(dict.fromkeys(Maker(**json.loads(line)) for line in lines))


def _makers_file(run: Run) -> Path:
    return run.recipe.run.folder / "made" / f"{run.name}.jsonl"


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _found(run: Run) -> str:
    summary = json.loads((run.folder / "summary.json").read_text())
    scores = [f"{key} {value:.3f}" for key, value in (summary["after"] or {}).items() if re.fullmatch(r"\w+@\d+", key)]
    return ", ".join(
        [*scores, f"{summary['rollout_tokens']:,} rollout tokens, trained in {summary['training_seconds']:.1f} s"]
    )


def _reason(log: Path) -> str:
    """The line of a log that says most: katds's own error, else the last one that names an exception."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    for pattern in (r"(error|interrupted)( on rank \d+)?: ", r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b"):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[-1][:300]
    return lines[-1][:300] if lines else "it said nothing"


def launcher(train: Path, ranks: int) -> Launch:
    """Starts `train` (launch/train.py) as documented: under DeepSpeed's launcher, or alone where there is one rank."""

    def launch(recipe: Path, log: Path) -> int:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
        with log.open("w") as file:
            return _wait([*command, str(train), "--config", str(recipe)], file.fileno())

    return launch


def _wait(command: list[str], output: int) -> int:
    """Exit code. The command is the head of a process group, which does not outlive this call, whatever ends it."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
    )
    try:
        return process.wait()
    finally:
        for number, seconds in ((signal.SIGTERM, PATIENCE_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(seconds)


def _environment() -> dict[str, str]:
    import torch

    ours = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
    ours["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), ours.get("PATH", "")])  # ninja lies there
    ours.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    if not torch.cuda.is_available():
        ours.setdefault("DS_ACCELERATOR", "cpu")
    return ours


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second comparison out of the folder meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"folder is {folder}, which cannot be written to ({error.strerror}). Give another.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"folder is {folder}, where another comparison is at work. Wait for it, or give another."
            ) from None
        yield
