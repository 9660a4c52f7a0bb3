"""Signals that ask a program to leave: a scheduler takes the machine away, or the time that it gave is over.

Slurm and Kubernetes send SIGTERM some time before SIGKILL; Slurm can send SIGUSR1 before the end of a job's time. A program listens from
its first moment on, before it loads PyTorch, and leaves where nothing is lost. Only the standard library, hence.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_noted = 0  # of this process, as handlers are


@contextmanager
def listening() -> Iterator[None]:
    """While open, a signal is noted and no longer ends the process. Only for the main thread; may be opened within another."""
    global _noted
    if signal.getsignal(SIGNALS[0]) is not _note:
        _noted = 0
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def noted() -> int:
    """The last signal that has reached this process; 0: none."""
    return _noted


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = number
