"""A rank that is gone ends the others in a bounded time, with a reason; nothing else does."""

from __future__ import annotations

import atexit
import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # before ranks are forked
import pytest

from katds import cli
from katds.errors import ConfigError
from katds.parallel import world as world_module
from katds.parallel.heartbeat import EXIT_CODE
from katds.parallel.ledger import Ledger, named
from katds.parallel.world import start_world

END = cli.end_process  # the tests' own is another
NAMES = {
    "ctypes": ctypes,
    "os": os,
    "time": time,
    "ConfigError": ConfigError,
    "world_module": world_module,
}  # what ranks may use

LOST_AFTER = 4.0


class Ranks:
    """Forked processes of one world, with the host names that `hosts` has for each. A rank meets the others, does what `joins` says,
    begins to beat, makes the process groups, does what `does` says, and leaves as the programs do; what it writes is in its log."""

    def __init__(
        self,
        folder: Path,
        hosts: str,
        does: str,
        lost_after: float = LOST_AFTER,
        timeout: float = 60.0,
        absent: int | None = None,
        joins: str = "",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.logs = [folder / f"rank-{rank}.log" for rank in range(len(hosts))]
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=self._rank, args=(rank, hosts, does, lost_after, timeout, joins))
            for rank in range(len(hosts)) if rank != absent
        ]  # fmt: skip
        for log in self.logs:
            log.touch()
        for process in self.processes:
            process.start()

    def _rank(self, rank: int, hosts: str, does: str, lost_after: float, timeout: float, joins: str) -> None:
        atexit._clear()  # type: ignore[attr-defined]  # pytest's and DeepSpeed's
        output = os.open(self.logs[rank], os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        socket.gethostname = lambda: hosts[rank]
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": str(hosts[:rank].count(hosts[rank])),
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
        }  # fmt: skip
        cli.end_process = END
        meet = world_module.meet

        def join(timeout: float) -> Any:
            met = meet(timeout)
            exec(joins, NAMES | {"rank": rank})
            return met

        world_module.meet = join

        def main() -> None:
            with world_module.closing_world():
                world = start_world(timeout, lost_after, "ADVICE")
                print("met", flush=True)
                exec(does, NAMES | {"world": world, "heartbeat": world_module._heartbeat})

        cli.run_main(main)

    def meet(self) -> None:
        deadline = time.monotonic() + 120
        while not all("met" in log.read_text() for log in self.logs):
            assert time.monotonic() < deadline and not any(process.exitcode for process in self.processes), self.said()
            time.sleep(0.1)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self, *ranks: int, within: float) -> list[int | None]:
        """Exit codes of these ranks."""
        deadline = time.monotonic() + within
        for rank in ranks:
            self.processes[rank].join(max(0.1, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Ranks] = []

    def begin(*args: Any, **more: Any) -> Ranks:
        started.append(Ranks(tmp_path, *args, **more))
        return started[-1]

    yield begin
    for process in (process for each in started for process in each.processes):
        process.kill()
        process.join()


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_silent_ends_the_others(start: Any, how: signal.Signals) -> None:
    """They wait in a collective for it. One line per host, with who, since when and what to do."""
    ranks = start("aabb", "world.rank < 3 and world.collective.barrier() or time.sleep(600)")
    ranks.meet()
    time.sleep(1)
    gone = time.monotonic()
    ranks.send(3, how)
    assert ranks.end(0, 1, 2, within=4 * LOST_AFTER) == [EXIT_CODE] * 3, ranks.said()
    assert time.monotonic() - gone > LOST_AFTER / 2
    said = ranks.said()
    for rank, here in ((0, "host a (ranks 0-1)"), (2, "host b (ranks 2-3)")):
        pattern = rf"error on {re.escape(here)}: rank 3 on host b has been silent since [\d:]+ \(\d+ s\): killed, stopped or stuck\. "
        assert re.fullmatch(pattern + rf"The run ends \(exit code {EXIT_CODE}\)\. ADVICE", last_line(said[rank])), said
    assert "error on host" not in said[1]
    if how == signal.SIGSTOP:  # awake again, it does not blame the others, and leaves as well
        ranks.send(3, signal.SIGCONT)
        assert ranks.end(3, within=3 * LOST_AFTER) == [EXIT_CODE]


def test_a_loss_leaves_time_for_last_words(start: Any) -> None:
    """A tracker is told that the run has failed, although the main thread waits in a collective."""
    does = "world_module.at_loss(lambda: print('last words', flush=True))\nworld.rank or world.collective.barrier()\ntime.sleep(600)"
    ranks = start("ab", does)
    ranks.meet()
    ranks.send(1, signal.SIGKILL)
    assert ranks.end(0, within=8 * LOST_AFTER) == [EXIT_CODE], ranks.said()
    assert "last words\n" in ranks.said()[0]


def test_a_host_that_is_lost_while_process_groups_are_made_ends_the_others(start: Any) -> None:
    """All have met, and it has never beaten: making the groups would wait for it until the time is over."""
    ranks = start("abc", "pass", timeout=600.0, joins="rank == 2 and os.kill(os.getpid(), 19)")
    assert ranks.end(0, 1, within=120) == [EXIT_CODE] * 2, ranks.said()
    for text in ranks.said()[:2]:  # gloo, too, may say at the end that the store is gone
        assert ": host c (rank 2) has been silent since" in text, text


def test_rank_0_that_is_silent_ends_the_others(start: Any) -> None:
    """It holds the store, which no longer answers."""
    ranks = start("abb", "world.rank and world.collective.barrier() or time.sleep(600)")
    ranks.meet()
    ranks.send(0, signal.SIGSTOP)
    assert ranks.end(1, 2, within=4 * LOST_AFTER) == [EXIT_CODE] * 2, ranks.said()
    _, said, other = ranks.said()
    assert "host b (ranks 1-2): host a (rank 0), which leads the run, has been silent since" in last_line(said)
    assert "error on host" not in other


def test_an_error_on_one_rank_is_told_to_the_other_hosts(start: Any) -> None:
    """By the rank, not by its silence; it keeps its own message and exit code."""
    ranks = start("abc", "time.sleep(1); world.rank < 2 and world.collective.barrier() or 1 // 0", lost_after=16.0)
    ranks.meet()
    assert ranks.end(0, 1, 2, within=60) == [EXIT_CODE, EXIT_CODE, 1], ranks.said()
    first, second, third = ranks.said()
    for host, rank, text in (("a", 0, first), ("b", 1, second)):
        cause = "rank 2 on host c has failed (ZeroDivisionError: integer division or modulo by zero); its log says more"
        assert last_line(text).startswith(f"error on host {host} (rank {rank}): {cause}. The run ends"), text
    assert "ZeroDivisionError" in third and "error on host" not in third


def test_a_killed_rank_is_named_before_the_errors_that_it_causes(start: Any) -> None:
    """The others' connections break: they fail at once, and yet the line names the one that is gone."""
    does = "time.sleep(1)\nif world.rank == 2: os.kill(os.getpid(), 9)\nworld.collective.barrier()"
    ranks = start("abc", does, lost_after=16.0)
    ranks.meet()
    assert ranks.end(0, 1, within=60) == [EXIT_CODE] * 2, ranks.said()
    for text in ranks.said()[:2]:
        assert ": host c (rank 2) has been silent since" in last_line(text), text


@pytest.mark.parametrize(
    "does",
    [
        "time.sleep(2 * world.rank)",  # they end at different times
        "time.sleep(2 * (2 - world.rank))",
        "world.collective.barrier()",
        "raise ConfigError('taken').everywhere()",
        "raise ConfigError('taken')",
    ],
)
def test_ends_that_are_no_loss(start: Any, does: str) -> None:
    """No line about hosts, and no waiting: the first leave long before the others, or all have the same error."""
    ranks = start("abc", does, lost_after=2.0)
    ranks.meet()
    met = time.monotonic()
    codes = ranks.end(0, 1, 2, within=60)
    assert codes == [2 if "raise" in does else 0] * 3, ranks.said()
    assert time.monotonic() - met < 10
    said = "".join(ranks.said())
    assert "on host" not in said and "TCPStore" not in said, said


def test_a_call_that_holds_the_interpreter_is_no_loss_below_the_limit(start: Any) -> None:
    """And who held it does not blame the others for what it did not hear."""
    holds = "world.rank == 1 and ctypes.PyDLL(None).usleep(2500000); time.sleep(3); world.collective.barrier()"
    ranks = start("ab", holds, lost_after=LOST_AFTER)
    ranks.meet()
    assert ranks.end(0, 1, within=60) == [0, 0], ranks.said()


def test_there_is_no_heartbeat_in_a_world_of_one_or_where_it_is_turned_off(start: Any) -> None:
    alone = start("a", "assert heartbeat is None")
    assert alone.end(0, within=120) == [0], alone.said()
    off = start("ab", "assert heartbeat is None", lost_after=0.0)
    assert off.end(0, 1, within=120) == [0, 0], off.said()


def test_who_is_missing_at_the_rendezvous(start: Any) -> None:
    """Rank 2 of 3 never comes; rank 0 says whom it waits for, and the end is a message."""
    ranks = start("abc", "pass", timeout=6.0, absent=2)
    assert ranks.end(0, 1, within=120) == [EXIT_CODE] * 2, ranks.said()
    first, second, _ = ranks.said()
    assert re.search(r"a: waiting \d s for ranks 2 of 3 \(here are 0 on a; 1 on b\), at most 6 s", first), first
    assert re.search(r"error: Ranks 2 of 3 \(here are 0 on a; 1 on b\) did not come within \d s to a\.", first), first
    assert "Rank 0 at 127.0.0.1:" in second and "before all 3 ranks had come" in second, second
    assert "Traceback" not in first + second


def test_rank_0_that_never_comes(start: Any) -> None:
    ranks = start("abb", "pass", timeout=3.0, absent=0)
    assert ranks.end(0, 1, within=120) == [EXIT_CODE] * 2, ranks.said()
    _, second, third = ranks.said()
    assert re.search(r"b: waiting \d s for rank 0 at 127\.0\.0\.1:\d+ \(connection refused\), at most 3 s", second), (
        second
    )
    assert "waiting" not in third, "one rank per host says so"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger(hosts: str) -> tuple[Ledger, Clock]:
    clock = Clock()
    return Ledger(list(hosts), 60.0, 15.0, clock), clock


def test_rank_0_s_account() -> None:
    """Without processes: who is lost when, and how it is said."""
    book, clock = ledger("aabbcc")
    for second in range(0, 300, 5):  # two hosts fall silent after 100 s
        clock.now = float(second)
        count = [str(second)] * 2 + [str(min(second, 100))] * 4
        bulletin = book.read(count)
        assert bool(bulletin) == (second >= 160), second
    assert json.loads(json.dumps(bulletin))["ranks"] == [2, 3, 4, 5]
    assert "host b (ranks 2-3) and host c (ranks 4-5) have been silent" in bulletin["what"]
    assert "this host is cut off from all others" in bulletin["what"]


def test_hosts_that_are_lost_together_are_named_together() -> None:
    """Their last beats came some seconds apart."""
    book, clock = ledger("abcd")
    bulletin: dict[str, Any] = {}
    while not bulletin:
        clock.now += 5.0
        bulletin = book.read(
            [str(clock.now), str(min(clock.now, 100.0)), str(min(clock.now, 105.0)), str(min(clock.now, 130.0))]
        )
    assert clock.now == 160 and bulletin["ranks"] == (1, 2)


def test_rank_0_that_has_slept_blames_nobody_for_that_time() -> None:
    book, clock = ledger("ab")
    book.read(["1", "1"])
    clock.now = 1000.0
    assert book.read(["2", "1"]) == {}
    for second in range(1005, 1060, 5):
        clock.now = float(second)
        assert book.read([str(second), "1"]) == {}
    clock.now = 1060.0
    assert book.read(["3", "1"])["ranks"] == (1,)


def test_a_rank_that_has_left_is_not_lost() -> None:
    book, clock = ledger("ab")
    for second in range(0, 300, 5):
        clock.now = float(second)
        assert book.read([str(second), "left"]) == {}
    assert book.read(["left", "left"]) == {"over": True}


def test_the_first_failure_is_the_cause_unless_somebody_is_silent() -> None:
    for silent, who in ((False, "rank 2 on host c has failed (E: x)"), (True, "host b (rank 1) has been silent")):
        book, clock = ledger("abcd")
        bulletin: dict[str, Any] = {}
        for second in range(0, 40, 5):
            clock.now = float(second)
            assert bulletin == {}
            failed = second >= 10
            marks = [str(second), "0" if silent and failed else str(second), "5", str(second)]
            marks[2] = "failed 1 E: x" if failed else str(second)
            marks[3] = "failed 2 RuntimeError: Connection closed by peer" if failed else str(second)
            bulletin = book.read(marks)
            if bulletin:
                break
        assert second == 25 and who in bulletin["what"]
    book, _ = ledger("abc")
    assert book.read(["left", "failed 2 E: x", "failed 1 E: x"]) == {"over": True}


def test_ranks_are_written_as_ranges() -> None:
    assert named([4]) == "rank 4" and named([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
