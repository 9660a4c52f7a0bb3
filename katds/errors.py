"""The errors that a user may meet. Each says what is wrong (with the field), the value seen, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self


class KatdsError(Exception):
    """Base of all errors that are shown as one message, without a traceback."""

    exit_code = 2
    heading = "error"
    reported_by: int | None = None  # all ranks raise it, and this one tells the user

    def everywhere(self, reported_by: int = 0) -> Self:
        """For an error that all ranks raise together."""
        self.reported_by = reported_by
        return self


class ConfigError(KatdsError):
    """The recipe, a flag, the data or a model folder cannot be used as given."""


class CheckpointError(KatdsError):
    """A checkpoint is missing, incomplete or of another run."""


class TrainingError(KatdsError):
    """Training cannot go on, e.g. because a gradient is not finite."""


class MissingRanksError(KatdsError):
    """Ranks have not come, or are gone: nothing is wrong with the recipe, and the same command may do."""

    exit_code = 69  # "a service is unavailable" (EX_UNAVAILABLE of sysexits.h)


class Interrupted(KatdsError):
    """Somebody asked the program to leave (`katds.signals`), which it does where nothing is lost: the same command goes on."""

    exit_code = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)
    heading = "interrupted"


class DesyncError(KatdsError):
    """Ranks disagree about something that must be identical; the run stops before it can hang or diverge."""


def first_sentence(error: BaseException) -> str:
    """What another library says, short enough to be quoted inside a message of ours."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")


def unloadable(role: str, path: Path, deepspeed: Path) -> Callable[[Exception], ConfigError]:
    """What a user is told of a model that fails to load, whatever DeepSpeed, transformers or safetensors raise."""
    return lambda error: ConfigError(
        f"{role}.path: {path} cannot be loaded with {deepspeed} ({type(error).__name__}: {first_sentence(error)}). Check the folder's "
        "files, and the values in that JSON."
    )
