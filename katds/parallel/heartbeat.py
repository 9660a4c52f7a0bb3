"""Heartbeats: a rank or a host that is gone ends the run everywhere, with a reason, within a bounded time.

A collective whose peer has lost its link waits for the process group's timeout, half an hour. So every process has two threads. One
beats: it writes its count into the rendezvous store over a connection of its own, and reads rank 0's bulletin. The other watches,
because a request over a dead link never returns. Rank 0 reads all counts and names in the bulletin who is lost; the others judge
nobody but rank 0.

Invariants:
- Nothing of the models, of the process groups or of a generator of random numbers is touched: results are those without it.
- A watcher that has slept itself (SIGSTOP, a paused container, a call that held the interpreter's lock) blames nobody for that time.

Cost: a beat is two requests of a few bytes per rank, and one by rank 0 for all counts: linear in ranks. With 1024 ranks and a beat
every 5 s the store serves 410 requests a second.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from katds.errors import MissingRanksError, first_sentence
from katds.parallel.ledger import HEARING_BEATS, LEFT, Ledger, Loss, named, since

EXIT_CODE = MissingRanksError.exit_code
LONGEST_BEAT_SECONDS = 5.0
BEATS = 8  # in lost_after_seconds, at least
READING_BEATS = 4
LONGEST_REASON = 300  # characters
PRINTING_SECONDS = 5.0  # a log on a dead file system must not keep the process


class Heartbeat:
    """Collective: started by all ranks of a world, which have met at `store`.

    `hosts` names each rank's host; `advice` says how to go on after a loss. Whoever learns of a loss prints one line per host and ends the
    process with EXIT_CODE, since its main thread waits in a collective.

    Attributes:
        last_words: done on a thread of its own before the process ends, in the time that the others have to read why.
    """

    last_words: Callable[[], object] | None = None

    def __init__(
        self, store: dist.Store, rank: int, hosts: Sequence[str], lost_after_seconds: float, advice: str
    ) -> None:
        self._store, self._rank, self._hosts, self._advice = store, rank, hosts, advice
        self._lost_after, self._beat = lost_after_seconds, min(LONGEST_BEAT_SECONDS, lost_after_seconds / BEATS)
        self._wake, self._left, self._released = threading.Event(), threading.Event(), threading.Event()
        self._failure, self._told = "", False
        self._ending = threading.Event()
        self._bulletin: dict[str, Any] = {}
        self._heard = time.monotonic()  # when the bulletin was last a new one
        self._broken = False  # the connection to the store
        self._ledger = Ledger(hosts, lost_after_seconds, HEARING_BEATS * self._beat) if rank == 0 else None
        if rank == 0:
            for other in range(len(hosts)):  # a rank may be lost before its first beat, and reading would wait for that
                store.compare_set(f"beat/{other}", "", "0")
        self._beater = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True)
        self._beater.start()
        self._watcher.start()

    def stop(self) -> None:
        """The normal end: this rank leaves, which is no loss. Rank 0 waits a moment for the others, whose store it may hold."""
        self._left.set()
        self._wake.set()
        self._beater.join(3 * self._beat)
        self._released.set()

    def fail(self, error: BaseException) -> None:
        """This rank's program ends with an error, which the others are told. Does not wait.

        Where there are other hosts the end of the process does, a few beats: connections that broke with a rank are the
        cause of more failures, and only rank 0 can tell who was first.
        """
        if self._ending.is_set():
            # The watcher has said why and ends the process: an error now is of the end's own making.
            time.sleep(2 * HEARING_BEATS * self._beat)
        self._failure = f"{type(error).__name__}: {first_sentence(error)}"[:LONGEST_REASON]
        self._wake.set()
        if len(set(self._hosts)) > 1:
            atexit.register(self._released.wait, (2 * HEARING_BEATS + READING_BEATS) * self._beat)

    # The thread that beats. It may hang in any request.

    def _keep_beating(self) -> None:
        count = 0
        try:
            while not self._left.is_set() and not self._bulletin.get("over"):
                self._wake.clear()
                count += 1
                self._exchange(str(count))
                self._wake.wait(self._beat)
            if self._failure:
                return
            self._store.set(f"beat/{self._rank}", LEFT)
            if self._ledger is not None:
                self._see_off(count + 1)
        except RuntimeError:  # c10d's errors
            self._broken = True

    def _exchange(self, mark: str) -> None:
        """One beat. A rank that has failed writes so once, with its place among the failures."""
        if not self._failure:
            self._store.set(f"beat/{self._rank}", mark)
        elif not self._told:
            place = self._store.add("failures", 1)
            self._store.set(f"beat/{self._rank}", f"failed {place} {self._failure}")
            self._told = True
        if self._ledger is not None:
            self._store.set("bulletin", json.dumps(self._ledger.read(self._counts()) | {"round": mark}))
        bulletin = json.loads(self._store.get("bulletin"))
        if bulletin["round"] != self._bulletin.get("round"):
            self._heard = time.monotonic()
        self._bulletin = bulletin

    def _counts(self) -> list[str]:
        return [count.decode() for count in self._store.multi_get([f"beat/{rank}" for rank in range(len(self._hosts))])]

    def _see_off(self, mark: int) -> None:
        self._store.set("bulletin", json.dumps({"round": str(mark), "over": True}))
        deadline = time.monotonic() + 2 * self._beat  # within which those that are busy read that it is over
        while any(count != LEFT and not count.startswith("failed") for count in self._counts()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)

    # The thread that watches.

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(self._beat / 4):
            now = time.monotonic()
            if now - looked > HEARING_BEATS * self._beat:
                self._heard = now
            looked = now
            bulletin = self._bulletin
            if bulletin.get("over"):
                if self._rank == 0:
                    self._wait_for_readers()
                self._released.set()
                return
            loss = Loss(tuple(bulletin["ranks"]), bulletin["what"]) if "ranks" in bulletin else self._out_of_touch(now)
            if loss is not None:
                if (
                    self._failure and self._rank in loss.ranks
                ):  # it has said itself what is wrong, and has an exit code of its own
                    self._wait_for_readers()
                    self._released.set()
                    return
                self._end(loss)

    def _out_of_touch(self, now: float) -> Loss | None:
        """Rank 0, or the store, does not answer."""
        silence = now - self._heard
        if silence <= (HEARING_BEATS * self._beat if self._broken else self._lost_after):
            return None
        if self._rank == 0:
            return Loss(
                (), f"the ranks' store has been silent {since(silence)}: its host is gone, or this host is cut off"
            )
        ranks = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[0]]
        there = self._hosts[0] != self._hosts[self._rank]
        who = (
            f"host {self._hosts[0]} ({named(ranks)}), which leads the run," if there else "rank 0, which leads the run,"
        )
        cause = "it is gone, or this host is cut off" if there else "its process is gone"
        return Loss((0,), f"{who} has been silent {since(silence)}: {cause}")

    def _end(self, loss: Loss) -> NoReturn:
        self._ending.set()
        here = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        speakers = [rank for rank in here if rank not in loss.ranks] or here
        if self._rank == speakers[0]:
            where = f"host {self._hosts[self._rank]} ({named(here)})"
            line = f"error on {where}: {loss.what}. The run ends (exit code {EXIT_CODE}). {self._advice}\n"
            _within(PRINTING_SECONDS, lambda: (sys.stderr.write(line), sys.stderr.flush()))
        if self.last_words is not None:
            threading.Thread(target=self.last_words, name="last-words", daemon=True).start()
        self._wait_for_readers()
        os._exit(EXIT_CODE)

    def _wait_for_readers(self) -> None:
        """An end breaks connections, and rank 0's perhaps the store; and some launchers kill all others. So all must have read the
        bulletin before, or have found out themselves that rank 0 is gone, and have spoken."""
        time.sleep((READING_BEATS + (self._rank == 0)) * self._beat)


def _within(seconds: float, action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
