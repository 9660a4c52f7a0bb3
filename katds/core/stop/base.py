"""The contract of a stop rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from katds.core.collective import Collective
from katds.core.types import Cut, RolloutRequest
from katds.settings import Section


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a stop rule may know of the run that it serves."""

    seed: int
    steps: int
    rollouts_per_step: int
    updates_per_step: int  # optimizer steps
    audit_fraction: float


class StopSettings(Section):
    """Base of a rule's section of the recipe; subclasses declare `kind` and their settings."""

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        """Raises ValueError (field, value, remedy) where the settings contradict each other or the rollouts' (recipe section
        `rollout`)."""

    def doubts(self, run: RunFacts) -> list[str]:
        """What is allowed but hardly meant: a line each (fields, values, remedy), told when the run begins."""
        return []

    def choices(self, run: RunFacts) -> list[str]:
        """What it settles by itself for this run: a line each, told when the run begins."""
        return []

    def contents(self) -> str:
        """A digest of the files that the rule reads; empty where it reads none. Asked for before any model is loaded.

        Raises ConfigError where a file is missing or not what it should be.
        """
        return ""

    @property
    def leaves_hole(self) -> bool:
        """Whether `StopRule.end` may return one."""
        return False

    @property
    def reads_divergence(self) -> bool:
        """As the rule's `needs_divergence`."""
        return False

    @property
    def reads_teacher_top_k(self) -> bool:
        """As that of the rule."""
        return False


class StopRule(Protocol):
    """Decides, chunk by chunk, whether a rollout that is being written shall end.

    Life of a rollout: `begin`, then `observe` for every chunk, then `end`. All three are local and deterministic;
    they must not depend on how the tokens are split into chunks. Only `finish_step` communicates. To be derived from: as it
    stands, it ends nothing.
    """

    Settings: ClassVar[type[StopSettings]]
    reasons: tuple[
        str, ...
    ]  # all that its cuts may give, the same on all ranks; mirrored as the metrics `stop/<reason>`
    needs_divergence: bool
    reads_teacher_top_k: bool = False  # whether that is on the teacher's most probable tokens, not on the student's

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        """The rule of a recipe; `settings` is an instance of `cls.Settings`."""
        ...

    def begin(self, request: RolloutRequest) -> None:
        """A rollout starts; the rule makes its state of it: O(1), or O(1) per token."""
        return None

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        """The next tokens of the response, and their divergences d_t [nats], equally many; without `needs_divergence` their
        values mean nothing.

        Returns the first cut that the rule makes, once, and None before and after. For a rollout that is not in the
        audit group nothing that follows the cut's `at` may change the rule's state: those tokens would not exist with
        smaller chunks. An audit rollout keeps being observed to its end, and is judged like any other.
        """
        return None

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        """The rollout is complete (`terminated`: by a cut). Returns its hole: response tokens [from, to) that the loss leaves out
        although they are kept; None: there is none."""
        return None

    def finish_step(self, collective: Collective, first_id: int, count: int) -> None:
        """Collective: all rollouts with ids first_id .. first_id + count - 1 are complete, each on one rank. Prepares
        the next step identically on all ranks."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Scalars for the monitor, identical on all ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as JSON-compatible values, identical on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
