"""A stop rule and an objective as a user writes them, outside the package: this file, and a line each where they are registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.types import Cut, Need, RolloutRequest, Signal, require
from katds.core.types import Field as Key
from katds.settings import Positive


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
