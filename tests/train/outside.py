"""A stop rule, objectives and a behaviour as a user writes them, outside the package: this file, and a line each that registers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from katds.core.behaviours.base import Behaviour, BehaviourSettings, Mix
from katds.core.objectives.aligned import aligned
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.types import Cut, Need, RolloutRequest, Signal, require
from katds.core.types import Field as Key
from katds.settings import Positive, Share


class TokenSettings(StopSettings):
    """End a rollout with a token."""

    kind: Literal["token"] = "token"
    modulus: Positive = Field(7, description="the token's id is a multiple of it")


class TokenRule(StopRule):
    """Ends a rollout with the first token whose id is a multiple of `modulus`, and leaves that out."""

    Settings: ClassVar[type[StopSettings]] = TokenSettings
    reasons = ("token",)
    needs_divergence = False

    def __init__(self, modulus: int) -> None:
        self._modulus = modulus
        self._seen: dict[int, int | None] = {}  # tokens of open rollouts; None: ended

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(settings.modulus)

    def begin(self, request: RolloutRequest) -> None:
        self._seen[request.id] = 0

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        for token in tokens:
            seen = self._seen[request.id]
            if seen is None:
                return None
            self._seen[request.id] = seen + 1
            if token % self._modulus == 0:
                self._seen[request.id] = None
                return Cut(seen, seen + 1, "token")
        return None

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        del self._seen[request.id]
        return None


class LikelihoodSettings(ObjectiveSettings):
    """Likelihood of the student's own tokens, weighted by the teacher's."""

    kind: Literal["likelihood"] = "likelihood"


class Likelihood(Objective):
    """sum_t -q(y_t) log p(y_t)."""

    Settings: ClassVar[type[ObjectiveSettings]] = LikelihoodSettings
    needs = frozenset({Need.SAMPLED})

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls()

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        chosen = logprobs_TV.gather(-1, actions_T[:, None]).squeeze(-1)
        weight = require(signal, Key.SAMPLED).exp()
        entropy = -(logprobs_TV.exp() * logprobs_TV).sum()
        return {"loss": -(weight * chosen).sum(), "kl": chosen.detach().sum(), "entropy": entropy.detach()}


class CrossEntropySettings(ObjectiveSettings):
    """Cross-entropy of the student under the teacher, over the whole vocabulary."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class CrossEntropy(Objective):
    """-sum_t sum_v q_t(v) log p_t(v)."""

    Settings: ClassVar[type[ObjectiveSettings]] = CrossEntropySettings
    needs = frozenset({Need.FULL})

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls()

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        teacher_TV = aligned(signal, Key.TEACHER_LOGPROBS, logprobs_TV)
        loss = -(teacher_TV.exp() * logprobs_TV).sum()
        return {"loss": loss, "kl": loss.detach(), "entropy": -(logprobs_TV.exp() * logprobs_TV).sum().detach()}


class AverageSettings(BehaviourSettings):
    """Tokens are drawn from a fixed mixture of student and teacher."""

    kind: Literal["average"] = "average"
    share: Share = Field(0.5, description="of the teacher")


class Average(Behaviour):
    """mu = (1 - share) p + share q, in all steps but the first."""

    Settings: ClassVar[type[BehaviourSettings]] = AverageSettings

    def __init__(self, share: float) -> None:
        self._weights = torch.tensor([1 - share, share]).log()

    @classmethod
    def from_settings(cls, settings: Any, steps: int) -> Self:
        return cls(settings.share)

    def at(self, step: int) -> Mix | None:
        return self._mix if step else None

    def _mix(self, student_SV: torch.Tensor, teacher_SV: torch.Tensor) -> torch.Tensor:
        student, teacher = self._weights.tolist()
        return torch.logaddexp(student_SV + student, teacher_SV + teacher)
