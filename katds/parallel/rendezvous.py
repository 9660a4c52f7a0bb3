"""How ranks meet: like torch's `env://`, but a rank that waits for others says for whom.

A host on which the program did not start (a missing folder, a wrong flag) would otherwise be half an hour of silence on all others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from katds.errors import ConfigError, Interrupted, MissingRanksError
from katds.signals import noted

SAY_EVERY_SECONDS = 30.0
POLL_SECONDS = 0.05
HEED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """All ranks have come. `hosts` names each rank's host."""

    store: dist.Store
    rank: int
    hosts: Sequence[str]


def meet(timeout_seconds: float) -> Meeting:
    """Collective: joins RANK of WORLD_SIZE at MASTER_ADDR:MASTER_PORT, where rank 0 or torchrun's agent holds the store.

    Raises:
        ConfigError: the port is taken.
        MissingRanksError: somebody has not come within the time.
        Interrupted: a signal asked to leave, and not all came soon after it.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds_store = rank == 0 and not agent
    wait = _Wait(timeout_seconds)
    if not holds_store:
        _reach(address, port, wait)
    try:
        store: dist.Store = dist.TCPStore(
            address,
            port,
            size,
            holds_store,
            timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if not holds_store or "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT {port} is in use on {socket.gethostname()}. Wait for the other run's end, or give another (--master_port)."
        ) from None
    # torchrun's store outlives the ranks that it starts anew.
    store = dist.PrefixStore(f"katds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"here/{rank}", socket.gethostname())
    hosts: list[str] | None = None
    if rank == 0:
        hosts = _receive(store, size, wait)
        store.set("hosts", json.dumps(hosts))
    else:
        wait = _Wait(timeout_seconds)  # from when rank 0 is there, which gives up before
        try:
            while not store.check(["hosts"]) and not wait.is_over:  # `get` alone would wait where no signal is heard
                wait.heed()
                time.sleep(4 * POLL_SECONDS)  # rank 0 serves all others
            if store.check(["hosts"]):
                hosts = json.loads(store.get("hosts"))
        except RuntimeError:  # c10d's: nobody answers any more
            pass
        if hosts is None:
            raise MissingRanksError(
                f"Rank 0 at {address}:{port} has ended or given up before all {size} ranks had come. See its log for who is missing."
            )
    return Meeting(store, rank, hosts)


def _reach(address: str, port: int, wait: _Wait) -> None:
    """Returns once somebody listens there."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        wait.heed()
        # One rank per host is enough to say so.
        wait.more(f"rank 0 at {address}:{port} ({reason})", speaks=os.environ.get("LOCAL_RANK", "0") == "0")
        time.sleep(0.2)


def _receive(store: dist.Store, size: int, wait: _Wait) -> list[str]:
    keys = [f"here/{rank}" for rank in range(size)]
    while not store.check(keys):
        wait.heed()
        if wait.is_long:
            here = [rank for rank in range(size) if store.check([keys[rank]])]
            came = {rank: store.get(keys[rank]).decode() for rank in here}
            missing = ", ".join(str(rank) for rank in range(size) if rank not in came)
            wait.more(f"ranks {missing} of {size} (here are {_by_host(came)})", speaks=True)
        time.sleep(POLL_SECONDS)
    return [host.decode() for host in store.multi_get(keys)]


def _by_host(came: dict[int, str]) -> str:
    hosts: dict[str, list[str]] = {}
    for rank, host in came.items():
        hosts.setdefault(host, []).append(str(rank))
    return "; ".join(f"{', '.join(ranks)} on {host}" for host, ranks in hosts.items())


class _Wait:
    """Says now and then what is waited for, and when it has been too long."""

    def __init__(self, timeout_seconds: float) -> None:
        self._start, self._timeout = time.monotonic(), timeout_seconds
        self._said = self._start
        self._asked: float | None = None

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self._start >= self._timeout

    def heed(self) -> None:
        """Raises Interrupted some seconds after a signal: with all ranks together, which may be about to come, leaving is better."""
        if not noted():
            return
        self._asked = self._asked or time.monotonic()
        if time.monotonic() - self._asked > HEED_SECONDS:
            raise Interrupted(
                f"{signal.Signals(noted()).name} came before all ranks had come to {socket.gethostname()}: from a scheduler, or from "
                "the launcher because another rank has failed, which says why. The same command begins anew."
            )

    @property
    def is_long(self) -> bool:
        return time.monotonic() - self._said >= min(SAY_EVERY_SECONDS, self._timeout / 2)

    def more(self, whom: str, speaks: bool) -> None:
        """Raises MissingRanksError when the time is over."""
        waited = time.monotonic() - self._start
        if waited >= self._timeout:
            raise MissingRanksError(
                f"{whom[0].upper()}{whom[1:]} did not come within {waited:.0f} s to {socket.gethostname()}. Look at the logs of "
                "the hosts that are missing, and whether they reach that address."
            )
        if self.is_long:
            self._said = time.monotonic()
            if speaks:
                print(
                    f"{socket.gethostname()}: waiting {waited:.0f} s for {whom}, at most {self._timeout:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
