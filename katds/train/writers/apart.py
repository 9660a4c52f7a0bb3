"""A writer beside training: the loop never waits for it, and does not end where it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Full, Queue
from typing import Any

from katds.errors import first_sentence
from katds.train.samples import Sample
from katds.train.writers.base import Watched, Writer

MOST_WAITING = 1000  # records of a tracker that does not take them; later ones are left out
PATIENCE_SECONDS = 60.0  # at the end of a run, for what waits
HASTE_SECONDS = 4.0  # where an error ends it: other ranks wait, and a launcher may soon end this one


class Apart(Writer):
    """Hands everything to `inner` on a thread of its own. Its first failure is said, and what failed is left out there; a network that
    comes back gets what follows. Of rollouts only the few pages of a run are handed over: those of every step, waiting, would fill the
    memory of rank 0.

    Args:
        name: of the setting, for messages.
        say: prints a line.
    """

    def __init__(self, name: str, inner: Writer, run: Watched, say: Callable[[str], None]) -> None:
        self._name, self._inner, self._run, self._say = name, inner, run, say
        self._warned = False
        self._waiting: Queue[Callable[[], None] | None] = Queue(MOST_WAITING)
        # A daemon: a server that never answers must not keep the process.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        settled = dict(record)
        self._hand(lambda: self._inner.scalars(step, settled))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        if samples and self._run.has_page(step):
            self._hand(lambda: self._inner.samples(step, samples))

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._hand(lambda: self._inner.summary(summary))

    def close(self, failed: bool = False) -> None:
        patience = HASTE_SECONDS if failed else PATIENCE_SECONDS
        self._hand(lambda: self._inner.close(failed))
        try:
            self._waiting.put(None, timeout=patience)
        except Full:
            pass
        else:
            self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"has not taken everything within {patience:.0f} s")

    def _hand(self, task: Callable[[], None]) -> None:
        try:
            self._waiting.put_nowait(task)
        except Full:
            self._warn(f"does not keep up, {MOST_WAITING} records wait")

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            try:
                task()
            except Exception as error:  # another library's, of any kind
                self._warn(f"failed ({type(error).__name__}: {first_sentence(error)})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"warning: {self._name} {what}; training goes on, the run folder has everything")
