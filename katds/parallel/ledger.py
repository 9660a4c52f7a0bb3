"""Rank 0's account of heartbeats: who was last heard of when, who is lost, and how that is said to a user."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HEARING_BEATS = 3  # after a failure or a broken connection: who is silent by then is its cause
LEFT = "left"  # the mark of a rank that has come to its end


@dataclass(frozen=True, slots=True)
class Loss:
    """Ranks that are gone or have failed, and what to tell the user about them."""

    ranks: tuple[int, ...]
    what: str


class Ledger:
    """Rank 0's account of who was last heard of when. Knows nothing of stores and threads; `clock` returns seconds."""

    def __init__(
        self,
        hosts: Sequence[str],
        lost_after_seconds: float,
        hearing_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts, self._lost_after, self._hearing, self._clock = hosts, lost_after_seconds, hearing_seconds, clock
        self._marks, self._changed = ["" for _ in hosts], [clock() for _ in hosts]
        self._read = clock()
        self._failed_since: float | None = None
        self._loss: Loss | None = None

    def read(self, marks: Sequence[str]) -> dict[str, Any]:
        """What the bulletin says after the ranks' newest marks: nothing, that all is over, or who is lost."""
        now = self._clock()
        if now - self._read > self._hearing:
            self._changed = [now for _ in self._hosts]
        self._read = now
        for rank, mark in enumerate(marks):
            if mark != self._marks[rank]:
                self._marks[rank], self._changed[rank] = mark, now
        if self._failed_since is None and any(map(_is_failure, marks)):
            self._failed_since = now
        if all(mark == LEFT or _is_failure(mark) for mark in marks):
            return {"over": True}  # each has said what there is to say
        self._loss = self._loss or self._judge(now)
        return {"ranks": self._loss.ranks, "what": self._loss.what} if self._loss else {}

    def _judge(self, now: float) -> Loss | None:
        heard_out = self._failed_since is not None and now - self._failed_since >= self._hearing
        patience = self._hearing if heard_out else self._lost_after
        if self._silent(now, patience):
            # Who was lost with the first may have beaten, and been read, a beat later each.
            silent = self._silent(now, patience if heard_out else patience - 2 * self._hearing / HEARING_BEATS)
            return Loss(tuple(silent), self._describe(silent, now))
        if heard_out:
            failed = [rank for rank, mark in enumerate(self._marks) if _is_failure(mark)]
            first = min(failed, key=lambda rank: int(self._marks[rank].split(" ", 2)[1]))
            reason = self._marks[first].split(" ", 2)[2]
            return Loss((first,), f"rank {first} on host {self._hosts[first]} has failed ({reason}); its log says more")
        return None

    def _silent(self, now: float, seconds: float) -> list[int]:
        return [
            rank
            for rank, mark in enumerate(self._marks)
            if mark != LEFT and not _is_failure(mark) and now - self._changed[rank] >= seconds
        ]

    def _describe(self, silent: Sequence[int], now: float) -> str:
        by_host: dict[str, list[int]] = {}
        for rank in silent:
            by_host.setdefault(self._hosts[rank], []).append(rank)
        silence = since(max(now - self._changed[rank] for rank in silent))
        whole = all(len(ranks) == self._hosts.count(host) for host, ranks in by_host.items())
        if not whole:
            who = " and ".join(f"{named(ranks)} on host {host}" for host, ranks in by_host.items())
            return f"{who} {_have(silent)} been silent {silence}: killed, stopped or stuck"
        who = " and ".join(f"host {host} ({named(ranks)})" for host, ranks in by_host.items())
        cut_off = by_host.keys() | {self._hosts[0]} == set(self._hosts) and len(by_host) > 1
        cause = (
            "this host is cut off from all others" if cut_off else "its processes, its power or its network are gone"
        )
        return f"{who} {_have(list(by_host))} been silent {silence}: {cause}"


def _is_failure(mark: str) -> bool:
    return mark.startswith("failed ")


def _have(several: Sequence[object]) -> str:
    return "have" if len(several) > 1 else "has"


def since(seconds: float) -> str:
    return f"since {time.strftime('%H:%M:%S', time.localtime(time.time() - seconds))} ({seconds:.0f} s)"


def named(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
