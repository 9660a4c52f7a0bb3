"""launch/cluster/slurm.sh on a real Slurm: what becomes of a job that is preempted, loses a node, is cancelled, or fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm as real
import yaml
from hosts import Hosts, missing
from same_run import assert_is_alike, assert_is_that_on_one_host, losing_recipe
from slurm import Slurm
from whole_runs import full_run
from zoo import shared_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Ranks that do as they are told: HEARS "saves" when a signal comes, or ends by it; or leaves with CODE-<node>.
RANK = """
import os, signal, sys, time
def leave(number, frame):
    print(f"rank {os.environ['RANK']} hears {signal.Signals(number).name}", flush=True)
    time.sleep(1)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1) if os.environ["DOES"] == "saves" else ():
    signal.signal(number, leave)
print("rank", os.environ["RANK"], "is here", flush=True)
if os.environ["DOES"].startswith("leaves"):
    sys.exit(int(os.environ["DOES"].split()[1 + int(os.environ["RANK"])]))
time.sleep(600)
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """For one test each: a job that is left, or a node that is down, would spoil the next."""
    if reason := missing() or real.missing():
        # .ci/run has installed them; namespaces are the machine's to give.
        assert "KATDS_CI_HOSTS" not in os.environ or "not installed" not in reason, reason
        pytest.skip(reason)
    with Hosts("abc") as three:
        yield three


@pytest.fixture
def slurm(hosts: Hosts, request: pytest.FixtureRequest) -> Slurm:
    return Slurm(hosts, getattr(request, "param", real.GRACE_SECONDS))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Any:
    """`name` is that of the job's files; `words` are sbatch's."""
    (tmp_path / "rank.py").write_text(RANK)

    def submit(name: str, *words: str, does: str = "", **variables: str) -> str:
        program = {"PROGRAM": str(tmp_path / "rank.py"), "DOES": does} if does else {}
        recipe = [] if does else ["--config", str(tmp_path / "recipe.yaml")]
        own = {"PYTHON": sys.executable, "HOSTFILE": str(tmp_path / f"hosts-{name}")}
        # sbatch's own words stand for the #SBATCH lines of the script.
        words = ("--gpus-per-node=1", f"--output={tmp_path}/log-{name}", *words)
        return slurm.submit(*words, "launch/cluster/slurm.sh", *recipe, **own | program | variables)

    return submit


def until(condition: Any, slurm: Slurm, folder: Path, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(f"== {file}\n{file.read_text()[-5000:]}" for file in sorted(folder.glob("log-*")))
        assert time.monotonic() < deadline, f"{slurm.ask('scontrol', 'show', 'jobs')}\n{logs}\n{slurm.told()}"
        time.sleep(0.05)


def write_recipe(base: Path, folder: Path) -> dict[str, Any]:
    """That of the whole runs, whose run on one host is there."""
    full_run(base, 2)
    recipe: dict[str, Any] = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": "run", "folder": str(folder)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


def has_state(slurm: Slurm, job: str, state: str, **others: str) -> Any:
    return lambda: ({"JobState": state} | others).items() <= slurm.job(job).items()


def test_what_becomes_of_jobs(slurm: Slurm, submit: Any, tmp_path: Path) -> None:
    """Who is asked to leave is queued again, and who has lost nodes, some times; not who is cancelled or has failed."""
    out_of_time = submit("time", "--nodes=1", "--time=1", "--signal=USR1@50", does="saves")
    cancelled = submit("cancel", "--nodes=1", does="saves")
    deaf = submit("deaf", "--nodes=1", does="ignores nothing")

    def log(name: str) -> str:
        file = tmp_path / f"log-{name}"
        return file.read_text() if file.exists() else ""

    until(lambda: all("is here" in log(name) for name in ("time", "cancel", "deaf")), slurm, tmp_path)
    slurm.ask("scancel", cancelled)
    slurm.ask("scancel", "--signal=TERM", deaf)  # to the ranks alone, as preemption does
    until(has_state(slurm, deaf, "PENDING", Restarts="1"), slurm, tmp_path)
    slurm.ask("scontrol", "hold", deaf)
    until(has_state(slurm, cancelled, "CANCELLED", Restarts="0"), slurm, tmp_path)
    assert "hears SIGTERM" in log("cancel") and f"saved; job {cancelled} was ended" in log("cancel")

    failed = submit("fail", "--nodes=2", does="leaves 69 3")  # of which srun says the larger
    lost = submit("lost", "--nodes=1", does="leaves 69", LOSSES="1")
    until(has_state(slurm, failed, "FAILED", Restarts="0", ExitCode="3:0"), slurm, tmp_path)
    until(has_state(slurm, out_of_time, "PENDING", Restarts="1"), slurm, tmp_path)
    slurm.ask("scontrol", "hold", out_of_time)
    assert "hears SIGUSR1" in log("time") and f"saved; job {out_of_time} is queued again" in log("time")
    until(has_state(slurm, lost, "FAILED", Restarts="1", ExitCode="69:0"), slurm, tmp_path)
    assert f"nodes are lost; job {lost} is queued again" in log("lost") and "lost, 2 times" in log("lost")


def test_a_preempted_run_makes_room_and_goes_on(
    hosts: Hosts, slurm: Slurm, submit: Any, base: Path, tmp_path: Path
) -> None:
    """Over two nodes, bit for bit the run on one host that was never interrupted."""
    recipe = write_recipe(base, tmp_path)
    run = submit("run", "--nodes=2")
    metrics = tmp_path / "run/metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text(), slurm, tmp_path)
    # So that the signal comes in the middle: before SIGTERM Slurm sends SIGCONT.
    hosts.signal("b", signal.SIGSTOP, "launch/train.py")
    urgent = submit("urgent", "--partition=urgent", "--nodes=2", does="leaves 0 0")
    until(has_state(slurm, urgent, "COMPLETED"), slurm, tmp_path)
    (saved,) = (tmp_path / "run/checkpoints").glob("step-*/state.json")
    assert not (tmp_path / "run/final").exists() and saved.parent.name != f"step-{recipe['train']['steps']}"
    until(has_state(slurm, run, "COMPLETED", Restarts="1"), slurm, tmp_path)
    said = (tmp_path / "log-run").read_text()
    assert "SIGTERM: saved" in said and f"saved; job {run} is queued again" in said
    assert_is_that_on_one_host(base, tmp_path / "run", 2)
    assert (tmp_path / "hosts-run").read_text() == "a slots=1\nb slots=1\n"


def test_a_run_that_loses_a_node_goes_on_with_another(
    hosts: Hosts, slurm: Slurm, submit: Any, base: Path, tmp_path: Path
) -> None:
    """The ranks that are left say who is gone, and srun waits for Slurm to find out as well, which queues the job again."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(losing_recipe(base, tmp_path)))
    run = submit("run", "--nodes=2")
    until((tmp_path / "run/checkpoints/step-1/state.json").exists, slurm, tmp_path)
    hosts.unplug("b")
    until(has_state(slurm, run, "COMPLETED", Restarts="1"), slurm, tmp_path)
    said = (tmp_path / "log-run").read_text()
    assert "error on host a (rank 0): host b (rank 1) has been silent since" in said and "NODE FAILURE" in said
    assert not (tmp_path / "hosts-run.losses").exists(), "it was found by Slurm, which does not count"
    assert (tmp_path / "hosts-run").read_text() == "a slots=1\nc slots=1\n"
    assert_is_alike(base, tmp_path / "run", 2)


def test_deepspeeds_launcher(hosts: Hosts, slurm: Slurm, submit: Any, base: Path, tmp_path: Path) -> None:
    """The run on one host, bit for bit; and a job that is cancelled leaves no ranks behind, which ssh has started, not Slurm."""
    write_recipe(base, tmp_path)
    # The launcher passes on only some of its environment; this file is its place for the rest.
    (tmp_path / "environment").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\nDOES=saves\n")
    by = {"LAUNCHER": "deepspeed", "DS_ENV_FILE": str(tmp_path / "environment")}
    run = submit("run", "--nodes=2", **by)
    until(has_state(slurm, run, "COMPLETED", Restarts="0"), slurm, tmp_path)
    assert_is_that_on_one_host(base, tmp_path / "run", 2)
    cancelled = submit("cancel", "--nodes=2", does="saves", **by)
    said = tmp_path / "log-cancel"
    until(lambda: said.exists() and said.read_text().count("is here") == 2, slurm, tmp_path)
    slurm.ask("scancel", cancelled)
    until(has_state(slurm, cancelled, "CANCELLED", Restarts="0"), slurm, tmp_path)
    until(lambda: not any("rank.py" in line for name in "ab" for line in hosts.processes(name)), slurm, tmp_path)


@pytest.mark.parametrize("slurm", [6], indirect=True, ids=["grace"])
def test_deepspeeds_launcher_makes_room(hosts: Hosts, slurm: Slurm, submit: Any, tmp_path: Path) -> None:
    """Slurm's signal does not reach the ranks of a job that is preempted; when its grace is over they are gone all the same, and the job is
    queued again."""
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nDOES=saves\n")
    by = {"LAUNCHER": "deepspeed", "DS_ENV_FILE": str(tmp_path / "environment")}
    job, said = submit("run", "--nodes=2", does="saves", **by), tmp_path / "log-run"
    until(lambda: said.exists() and said.read_text().count("is here") == 2, slurm, tmp_path)
    urgent = submit("urgent", "--partition=urgent", "--nodes=2", does="sleeps")
    until(has_state(slurm, urgent, "RUNNING"), slurm, tmp_path)

    def launched() -> list[str]:
        return [line for name in "ab" for line in hosts.processes(name) if "deepspeed.launcher" in line]

    until(lambda: not launched(), slurm, tmp_path, seconds=30)
    until(has_state(slurm, job, "PENDING", Restarts="1"), slurm, tmp_path)
    slurm.ask("scontrol", "hold", job)
    slurm.ask("scancel", urgent)
    assert "DUE TO PREEMPTION" in said.read_text()
