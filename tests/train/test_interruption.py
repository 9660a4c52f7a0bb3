"""A run that is asked to leave finishes its step, saves and leaves on all ranks; resumed, it is the run that was never asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from test_whole_runs import assert_same_as_tensorboard
from whole_runs import full_run, records, timeless, train, weights
from zoo import build_recipe, shared_folder

from katds import run
from katds.config import Recipe
from katds.core.collective import Solo
from katds.errors import Interrupted
from katds.signals import listening
from katds.train.interruption import Interruption
from katds.train.learner import Learner

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def asked_in(recipe: dict[str, Any], rank: int, during: int, number: int) -> tuple[bool, bool]:
    """The run of which one rank gets a signal in the middle of a step; whether the signal's handler is then what it was before."""
    update, before = Learner.update, signal.getsignal(number)

    def interrupted(self: Learner, batch: Any, requests: Any, step: int) -> Any:
        if step == during and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return update(self, batch, requests, step)

    Learner.update = interrupted  # type: ignore[method-assign]
    finished = run.train(Recipe.model_validate(recipe))
    return finished, signal.getsignal(number) == before


# After step 1 nothing is due; after step 2 an evaluation and a checkpoint; step 4 is the last one.
@pytest.mark.parametrize(
    ("during", "number", "saved"), [(0, signal.SIGUSR1, 1), (1, signal.SIGTERM, 2), (3, signal.SIGTERM, None)]
)
def test_one_rank_s_signal_ends_all_after_the_same_step(
    base: Path, tmp_path: Path, during: int, number: int, saved: int | None
) -> None:
    full, _ = full_run(base, 2)
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": f"asked-{tmp_path.name}"}
    folder = base / "runs" / recipe["run"]["name"]
    ends = run_ranks(2, asked_in, recipe, 1, during, number)
    assert ends == [(saved is None, True)] * 2, "and the handler is gone"
    if saved is not None:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{saved}"]
        assert not (folder / "final").exists() and not (folder / "summary.json").exists()
        evaluated = [record["step"] for record in records(folder) if "eval/avg@2" in record]
        assert evaluated == [0], "there may be no time for the one after step 2"
        recipe["run"]["resume"] = True
        train(2, recipe)
    assert [timeless(record) for record in records(folder)] == [timeless(record) for record in records(full)]
    for name, value in weights(full).items():
        assert (weights(folder)[name] == value).all(), name
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, full))
    assert (ours["before"], ours["after"]) == (theirs["before"], theirs["after"])


def broken_off(recipe: dict[str, Any], during: int) -> str:
    def fail(self: Learner, batch: Any, requests: Any, step: int) -> Any:
        if step == during:
            raise ZeroDivisionError("as if killed")
        return update(self, batch, requests, step)

    update = Learner.update
    Learner.update = fail  # type: ignore[method-assign]
    try:
        run.train(Recipe.model_validate(recipe))
    except ZeroDivisionError as error:
        return str(error)
    return "finished"


def test_auto_begins_goes_on_and_repeats(base: Path, tmp_path: Path) -> None:
    """One command for all starts of a run: before its first checkpoint, after it, and when it is done."""
    full, _ = full_run(base, 2)
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": f"auto-{tmp_path.name}", "resume": "auto"}
    folder = base / "runs" / recipe["run"]["name"]
    assert run_ranks(2, broken_off, recipe, 1) == ["as if killed"] * 2
    assert not (folder / "checkpoints").exists() and [r["step"] for r in records(folder)] == [0, 0]
    assert run_ranks(2, broken_off, recipe, 3) == ["as if killed"] * 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    for _ in range(2):
        train(2, recipe)
        assert [timeless(record) for record in records(folder)] == [timeless(record) for record in records(full)]
        assert_same_as_tensorboard(folder)
        for name, value in weights(full).items():
            assert (weights(folder)[name] == value).all(), name

    shutil.rmtree(folder / "checkpoints")  # to save space: the folder is still that of a finished run
    with pytest.raises(AssertionError, match="already holds a run"):
        train(1, recipe)


def asked_while_loading(recipe: dict[str, Any], before: str) -> tuple[int, str, int | None]:
    """The run of which rank 1 gets a signal before a function of katds.run is called."""
    called = getattr(run, before)

    def interrupted(*given: Any, **more: Any) -> Any:
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return called(*given, **more)

    setattr(run, before, interrupted)
    with pytest.raises(Interrupted) as left:
        run.train(Recipe.model_validate(recipe))
    return left.value.exit_code, str(left.value), left.value.reported_by


@pytest.mark.parametrize("before", ["read_inputs", "load_student"])
def test_a_signal_before_training_ends_all_ranks_and_leaves_nothing_half_written(tmp_path: Path, before: str) -> None:
    recipe = build_recipe(tmp_path, "early", train={"steps": 1}, evaluation={"data": None})
    for code, said, reporter in run_ranks(2, asked_while_loading, recipe, before):
        assert (code, reporter) == (75, 0) and said.startswith("SIGTERM came before training. Nothing is lost"), said
    folder = tmp_path / "runs" / "early"
    assert {p.name for p in folder.glob("*")} == (set() if before == "read_inputs" else {"config.yaml"})
    train(2, recipe)  # the same command: the folder is free
    assert (folder / "final").exists()


@pytest.mark.slow
def test_a_program_listens_from_its_first_moment(tmp_path: Path) -> None:
    """launch/train.py on two ranks, one of which gets SIGTERM as soon as it is there: the default would kill it, -15."""
    recipe = build_recipe(tmp_path, "early", evaluation={"data": None})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    of = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "launch/train.py", "--config", str(tmp_path / "recipe.yaml")]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | of | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]  # fmt: skip
    while not int(caught(ranks[1].pid), 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    assert "torch" not in Path(f"/proc/{ranks[1].pid}/maps").read_text(), "it did listen, but late"
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert "interrupted: SIGTERM came before training." in said[0] and "interrupted" not in said[1], said
    assert not (tmp_path / "runs").exists()


def caught(pid: int) -> str:
    """The signals that a process has handlers for."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return line.split()[1]


def test_a_signal_is_noted_and_handlers_are_put_back() -> None:
    interruption = Interruption(Solo())
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with listening():
            assert not interruption.asked() and interruption.name == ""
            os.kill(os.getpid(), signal.SIGUSR1)
            with listening():  # within another: what was noted stays
                assert interruption.asked() and interruption.asked() and interruption.name == "SIGUSR1"
            assert interruption.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


class Signalled(Solo):
    """This process gets a signal while the ranks agree: too late for them to hear of it."""

    def max(self, values: torch.Tensor) -> torch.Tensor:
        agreed = super().max(values)
        os.kill(os.getpid(), signal.SIGTERM)
        return agreed


def test_a_signal_that_arrives_while_ranks_agree_is_heard_the_next_time() -> None:
    interruption = Interruption(Signalled())
    with listening():
        assert not interruption.asked()
        assert interruption.asked() and interruption.name == "SIGTERM"
