"""Leaving when somebody asks (`katds.signals`): the ranks agree on it where the state can be saved, or there is none yet."""

from __future__ import annotations

import signal

import torch

from katds import signals
from katds.core.collective import Collective
from katds.errors import Interrupted


class Interruption:
    """Whether any rank was asked to leave. Schedulers need not reach all of them, nor at the same time."""

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._agreed = 0  # a signal that arrives while ranks wait for each other in `asked` is for the next call

    def asked(self) -> bool:
        """Collective."""
        self._agreed = int(self._collective.max(torch.tensor([signals.noted()])).item())
        return self._agreed != 0

    def leave_if_asked(self, what: str) -> None:
        """Collective: raises Interrupted on all ranks. `what`: was going on, and how to go on with it."""
        if self.asked():
            raise Interrupted(f"{self.name} {what}").everywhere()

    @property
    def name(self) -> str:
        """Of the signal that the ranks have agreed on."""
        return signal.Signals(self._agreed).name if self._agreed else ""
