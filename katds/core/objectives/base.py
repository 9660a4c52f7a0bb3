"""The contract of an objective."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self

import torch

from katds.core.types import Need, Signal
from katds.settings import Section


class ObjectiveSettings(Section):
    """Base of an objective's section of the recipe; subclasses declare `kind` and their settings."""

    def check(self, filtered: bool, minibatches: int) -> None:
        """Raises ValueError (field, value, remedy) where the objective would be wrong: `filtered` says that top-p, top-k or
        min-p cut the sampling distribution, `minibatches` how many updates learn from one set of rollouts."""


class Objective(Protocol):
    """A distillation loss over response tokens.

    Objectives return sums over tokens; the learner divides once, by the global number of kept tokens. They see one tile
    of tokens at a time, so no [tokens, vocabulary] tensor outlives a tile.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    needs: frozenset[Need]

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """The objective of a recipe; `settings` is an instance of `cls.Settings`."""
        ...

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """Sums over the tile's tokens.

        Args:
            logprobs_TV: the student's log-softmax at the rollout temperature, float32, requires grad.
            actions_T: sampled token ids, int64.
            signal: the teacher's signal for the same tokens (`Field` keys for what `needs` declares; for `Need.FULL`
                `Field.TEACHER_LOGPROBS` [T, V]).

        Returns:
            {"loss": scalar to differentiate, ...further detached scalars that the monitor reports per token}.
        """
        ...
