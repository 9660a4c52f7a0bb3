"""How ranks act as one: one of them acts for all, all of them must have read the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from katds.core.collective import Collective
from katds.errors import ConfigError, DesyncError, KatdsError

T = TypeVar("T")
VISIBLE_SECONDS = 20.0  # network file systems show a new file with some delay


def on_main(collective: Collective, action: Callable[[], T]) -> T:
    """Collective: rank 0 acts, all ranks get the result or raise the same user error, which rank 0 alone reports."""
    outcome: tuple[T | None, KatdsError | None] = (None, None)
    if collective.rank == 0:
        try:
            outcome = (action(), None)
        except KatdsError as error:
            outcome = (None, error)
        except OSError as error:
            reason = ConfigError(
                f"{error.filename} cannot be used ({error.strerror}). Give a run.folder that can be written."
            )
            outcome = (None, reason)
    value, failure = collective.gather(outcome)[0]
    if failure is not None:
        failure.reported_by_main = True
        raise failure
    return value  # type: ignore[return-value]


def together(collective: Collective, action: Callable[[], T], explain: Callable[[Exception], KatdsError]) -> T:
    """Collective: every rank acts; where one fails, all raise the first failure as a user error."""
    value, failure = None, None
    try:
        value = action()
    except Exception as error:
        failure = error if isinstance(error, KatdsError) else explain(error)
    failures = [f for f in collective.gather(failure) if f is not None]
    if failures:
        failures[0].reported_by_main = True
        raise failures[0]
    return value  # type: ignore[return-value]


def same_everywhere(collective: Collective, values: Mapping[str, object]) -> None:
    """Collective: raises DesyncError where a rank has read something else, e.g. an old file on one node."""
    for rank, other in enumerate(collective.gather(dict(values))):
        different = sorted(key for key in values.keys() | other.keys() if values.get(key) != other.get(key))
        if different:
            raise DesyncError(
                f"{different[0]} is {values.get(different[0])!r} on rank {collective.rank} but {other.get(different[0])!r} on rank {rank}. "
                "Give all nodes the same recipe, data and models."
            )


def visible_everywhere(collective: Collective, file: Path, field: str) -> None:
    """Collective: raises ConfigError where a rank does not see what rank 0 has written: checkpoints need one file system."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, seen in enumerate(collective.gather(file.exists())) if not seen]
    if blind:
        raise ConfigError(
            f"{field}: rank {blind[0]} does not see {file}, which rank 0 has written. Put it on a file system that all nodes share."
        )
