"""The contract of a behaviour policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import torch

from katds.core.types import RolloutRequest
from katds.settings import Section

Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log p [S, V], log q [S, V]) -> log mu [S, V], each normalised, at the temperature of sampling, before filters."""


class BehaviourSettings(Section):
    """Base of a policy's section of the recipe; subclasses declare `kind` and their settings."""

    # Whether tokens of a response may come from another distribution than the student's, as `Behaviour.at` says. It then takes one teacher
    # that is lent whole for all of a phase; the recipe is checked for it.
    blends: ClassVar[bool] = True

    def check(self, greedy: bool) -> None:
        """Raises ValueError (field, value, remedy) where the settings contradict the rollouts'; `greedy`: nothing is sampled."""


class Behaviour(Protocol):
    """Who writes: which distribution mu the next token of a response is drawn from, and how much the teacher writes before it.

    The stop rule and the objective go on comparing student and teacher; `Field.WRITTEN` is log mu. To be derived from.
    """

    Settings: ClassVar[type[BehaviourSettings]]
    teacher_writes: ClassVar[bool] = False  # whether `prefix` asks for anything; the teacher is then lent whole

    @classmethod
    def from_settings(cls, settings: Any, steps: int) -> Self:
        """The policy of a recipe; `settings` is an instance of `cls.Settings`, `steps` the length of the run."""
        ...

    def at(self, step: int) -> Mix | None:
        """How student and teacher are mixed in this step; None: the student writes alone, and the teacher takes no steps."""
        return None

    def prefix(self, request: RolloutRequest, step: int, seed: int) -> int:
        """How many tokens the teacher writes first, below `request.max_new_tokens`; a function of these arguments alone."""
        return 0
