"""The errors that a user may meet. Each says what is wrong (with the field), the value seen, and what to do."""

from __future__ import annotations


class KatdsError(Exception):
    """Base of all errors that are shown as one message, without a traceback, with exit code 2."""

    reported_by_main = False  # all ranks raise it, and rank 0 tells the user


class ConfigError(KatdsError):
    """The recipe, a flag, the data or a model folder cannot be used as given."""


class CheckpointError(KatdsError):
    """A checkpoint is missing, incomplete or of another run."""


class TrainingError(KatdsError):
    """Training cannot go on, e.g. because a gradient is not finite."""


class DesyncError(KatdsError):
    """Ranks disagree about something that must be identical; the run stops before it can hang or diverge."""


def first_sentence(error: Exception) -> str:
    """What another library says, short enough to be quoted inside a message of ours."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
