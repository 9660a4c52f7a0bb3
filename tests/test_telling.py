"""One line for what all ranks have alike, and a line from a rank that fails alone: real processes, started as launchers start them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from katds import cli, telling
from katds.errors import ConfigError

ROOT = Path(__file__).parent.parent
END = cli.end_process  # the tests' own is another


def ranks(folder: Path, size: int, main: Callable[[int], None], per_host: int | None = None) -> list[tuple[int, str]]:
    """Exit code and words of each rank, none of which ever meets another."""
    logs = [folder / f"{rank}.log" for rank in range(size)]
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_rank, args=(rank, size, per_host or size, logs[rank], main)) for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [(int(p.exitcode or 0), log.read_text()) for p, log in zip(started, logs, strict=True)]


def _rank(rank: int, size: int, per_host: int, log: Path, main: Callable[[int], None]) -> None:
    atexit._clear()  # type: ignore[attr-defined]  # pytest's
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % per_host), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(log.parent)}  # of this start
    cli.end_process = END
    cli.run_main(lambda: main(rank))


@pytest.fixture(autouse=True)
def own_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "marks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "marks"))
    monkeypatch.setattr(telling, "GRACE_SECONDS", 0.5)


def alike(rank: int) -> None:
    time.sleep(0.05 * (4 - rank))  # rank 0 is the last
    raise ConfigError("x is 3. Lower it.")


def test_ranks_that_fail_alike_say_it_once(tmp_path: Path) -> None:
    assert ranks(tmp_path, 4, alike) == [(2, "error: x is 3. Lower it.\n"), (2, ""), (2, ""), (2, "")]
    (tmp_path / "again").mkdir()
    assert "".join(said for _, said in ranks(tmp_path / "again", 2, alike)) == "error: x is 3. Lower it.\n"


def test_the_same_start_from_the_same_shell_is_told_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert "".join(said for _, said in ranks(tmp_path, 2, alike)) == "error: x is 3. Lower it.\n"
        time.sleep(2.5)


def alone(rank: int) -> None:
    if rank == 2:
        raise ConfigError("disk is full. Make room.")


def test_a_rank_that_fails_alone_says_so(tmp_path: Path) -> None:
    assert ranks(tmp_path, 3, alone) == [(0, ""), (0, ""), (2, "error on rank 2: disk is full. Make room.\n")]


def each(rank: int) -> None:
    raise ConfigError(f"disk {rank // 2} is full. Make room.")


def test_other_errors_have_lines_of_their_own(tmp_path: Path) -> None:
    said = [said for _, said in ranks(tmp_path, 4, each, per_host=2)]
    assert (
        said[0] == "error: disk 0 is full. Make room.\n" and said[2] == "error on rank 2: disk 1 is full. Make room.\n"
    )
    assert said[1] == said[3] == ""


def agreed(rank: int) -> None:
    raise ConfigError("the node has no disk. Add one.").everywhere(reported_by=1)


def test_what_ranks_have_agreed_on_is_said_by_the_rank_that_knows(tmp_path: Path) -> None:
    assert ranks(tmp_path, 3, agreed) == [(2, ""), (2, "error on rank 1: the node has no disk. Add one.\n"), (2, "")]


def test_marks_do_not_pile_up(tmp_path: Path) -> None:
    (old := tmp_path / "marks" / "katds-said-before").touch()
    os.utime(old, (1, 1))
    ranks(tmp_path, 2, alike)
    assert not old.exists() and len(list(old.parent.iterdir())) == 1


@pytest.mark.slow
def test_a_wrong_flag_is_one_line_of_a_node(tmp_path: Path) -> None:
    """As Slurm, Kubernetes and ssh start it: none of these ends the others before they have spoken."""
    command = [str(ROOT / "launch/cluster/node.sh"), "launch/train.py", "--stop.windw", "3"]
    environment = os.environ | {"RANKS_PER_NODE": "3", "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and done.stderr.count("stop.windw is not a setting") == 1, done.stderr
