"""A signal while ranks wait for others that do not come; who is missing is in test_heartbeat.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from katds.errors import Interrupted
from katds.parallel import rendezvous
from katds.signals import listening


def wait(rank: int, port: int, said: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with listening():
        said.touch()
        try:
            rendezvous.meet(60.0)
        except Interrupted as error:
            said.write_text(f"{error.exit_code} {error}")


@pytest.mark.parametrize("came", [[0, 1], [1]])
def test_ranks_that_wait_for_others_leave_when_they_are_asked_to(
    tmp_path: Path, came: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rank 0 is there, the others wait in a request to its store; where it is not, they try to reach it."""
    monkeypatch.setattr(rendezvous, "HEED_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / str(rank) for rank in came]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=wait, args=(rank, port, log)) for rank, log in zip(came, logs, strict=True)]
    for rank in ranks:
        rank.start()
    while not all(log.exists() for log in logs):
        time.sleep(0.05)
    time.sleep(2)
    for rank in reversed(ranks):
        assert rank.pid is not None and rank.is_alive()
        os.kill(rank.pid, signal.SIGUSR1)
        rank.join(20)
    for rank, log in zip(ranks, logs, strict=True):
        assert rank.exitcode == 0 and log.read_text().startswith("75 SIGUSR1 came before all ranks had come to"), (
            log.read_text()
        )
