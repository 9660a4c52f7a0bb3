"""How ranks act as one: one of them acts for all, all of them must have read the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from katds.core.collective import Collective
from katds.errors import ConfigError, DesyncError, KatdsError, first_sentence

T = TypeVar("T")
VISIBLE_SECONDS = 20.0  # network file systems show a new file with some delay


def on_main(collective: Collective, action: Callable[[], T]) -> T:
    """Collective: rank 0 acts, all ranks get the result or raise the same user error."""
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
        raise failure.everywhere()
    return value  # type: ignore[return-value]


def together(
    collective: Collective, action: Callable[[], T], explain: Callable[[Exception], KatdsError] | None = None
) -> T:
    """Collective: every rank acts; where one fails, all raise the first failure as a user error, which the rank reports that has it.

    `explain` makes a user error of what another library raises. Without it, that is a bug, and its rank raises it as it is.
    """
    value, failure, bug = None, None, None
    try:
        value = action()
    except KatdsError as error:
        failure = error
    except Exception as error:
        bug = None if explain else error
        failure = explain(error) if explain else KatdsError(f"{type(error).__name__}: {first_sentence(error)}")
    for rank, first in enumerate(collective.gather(failure)):
        if first is not None:
            raise bug or first.everywhere(reported_by=rank)
    return value  # type: ignore[return-value]


def same_everywhere(collective: Collective, values: Mapping[str, object]) -> None:
    """Collective: raises DesyncError where a rank has read something else, e.g. an old file on one node."""
    first, *others = collective.gather(dict(values))
    for rank, other in enumerate(others, 1):
        different = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if different:
            raise DesyncError(
                f"{different[0]} is {first.get(different[0])!r} on rank 0 but {other.get(different[0])!r} on rank {rank}. "
                "Give all nodes the same recipe, data and models."
            ).everywhere()


def visible_everywhere(collective: Collective, file: Path, field: str) -> None:
    """Collective: raises ConfigError where a rank does not see what rank 0 has written: checkpoints need one file system."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, seen in enumerate(collective.gather(file.exists())) if not seen]
    if blind:
        raise ConfigError(
            f"{field}: rank {blind[0]} does not see {file}, which rank 0 has written. Put it on a file system that all nodes share."
        ).everywhere()
