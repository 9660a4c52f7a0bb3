"""The contract of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch

from katds.core.collective import Collective
from katds.core.types import Field, Need, RolloutBatch, Signal
from katds.settings import Section


class Pen(Protocol):
    """The teacher as a writer, for objectives that want to see how it would go on."""

    def write(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
        """Collective: the teacher's continuation of each of this rank's own prefixes (token ids, prompt included), in order: of the i-th up
        to `tokens[i]` tokens, or as many as the context has room for, sampled as rollouts are, an end token of either model included. A
        rank may have none. What is drawn depends on the run's seed, the step and the prefix alone."""
        ...

    def embed(self, ids: torch.Tensor, output: bool = False) -> torch.Tensor:
        """Collective: the teacher's input embeddings of token ids of any shape, or their rows of its head (`output`), float32 [..., H], on
        the device of `ids`. A rank may have none."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, and the seed of whatever an objective draws: with the step and a rollout's id it names a random number.

    `teacher` is there for objectives with `teacher_writes`.
    """

    step: int
    steps: int
    seed: int
    teacher: Pen | None = None


class ObjectiveSettings(Section):
    """Base of an objective's section of the recipe; subclasses declare `kind` and their settings."""

    @property
    def aligns_text(self) -> bool:
        """Whether the objective needs `Need.CHUNKS`, and with it a teacher that reads text in its own tokens."""
        return False

    def check(self, filtered: bool, minibatches: int, blended: bool = False) -> None:
        """Raises ValueError (field, value, remedy) where the objective would be wrong: `filtered` says that top-p, top-k or
        min-p cut the sampling distribution, `minibatches` how many updates learn from one set of rollouts, `blended` that tokens
        come from another distribution than the student's (section `behaviour`)."""


class Objective(Protocol):
    """A distillation loss over response tokens.

    Objectives return sums over tokens; the learner divides once, by the global number of kept tokens. They see one tile
    of tokens at a time, so no [tokens, vocabulary] tensor outlives a tile. What needs whole rollouts, or all of a step, is made
    beforehand by `prepare`. To be derived from.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    needs: frozenset[Need]
    teacher_top_k: ClassVar[int | None] = None  # K of Need.TEACHER_TOP_K; None: rollout.divergence_top_k
    teacher_writes: ClassVar[bool] = False  # whether `prepare` lets the teacher write; it is then lent whole
    # Whether it learns from prefixes that the teacher wrote before a response (behaviour `teacher_prefix`). The signal then has a row for
    # each of their tokens, before those of the response: GUIDED is set, TEACHER_TOP and its ids are there, all other floats are nan. Steps
    # without prefixes have no GUIDED.
    reads_prefix: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """The objective of a recipe; `settings` is an instance of `cls.Settings`."""
        ...

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective, once per step, before rollouts are dealt to learners: further fields of the signal, for the rows of
        `batch.signal` and on its device. They must not depend on which rank holds which rollout.

        `Field.LEARNED` leaves tokens out of the loss, and of the count that it is divided by; a reward's term keeps them. A
        rank without rollouts returns the same fields with no rows.
        """
        return {}

    def metrics(self) -> Mapping[str, float]:
        """Scalars of the last `prepare` for the monitor, identical on all ranks."""
        return {}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """Sums over the tile's tokens.

        Args:
            logprobs_TV: the student's log-softmax at the rollout temperature, float32, requires grad.
            actions_T: sampled token ids, int64.
            signal: for the same tokens (`Field` keys for what `needs` declares; for `Need.FULL` `Field.TEACHER_LOGPROBS` [T, V];
                and what `prepare` has made).

        Returns:
            {"loss": scalar to differentiate, ...further detached scalars that the monitor reports per token}.
        """
        ...
