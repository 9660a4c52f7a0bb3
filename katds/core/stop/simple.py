"""Stop rules that look at nothing but the length: the baselines that KAT is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from katds.core import counter
from katds.core.collective import Collective
from katds.core.stop.base import RunFacts, StopSettings
from katds.core.types import Cut, RolloutRequest, StopReason
from katds.settings import Positive

# Keeps the lengths independent of other numbers drawn from (seed, rollout id), such as membership of the audit group.
_STREAM = 0x52414E44


class NeverSettings(StopSettings):
    """Every rollout runs to its end: plain on-policy distillation."""

    kind: Literal["never"] = "never"


class PrefixSettings(StopSettings):
    """Every rollout ends at the same length."""

    kind: Literal["prefix"] = "prefix"
    tokens: Positive = Field(1024, description="length at which every rollout ends")

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        if self.tokens > max_new_tokens:
            raise ValueError(
                f"stop.tokens {self.tokens} is longer than rollout.max_new_tokens {max_new_tokens}; lower stop.tokens"
            )


class RandomSettings(StopSettings):
    """Every rollout ends at a random length: the control for saved tokens."""

    kind: Literal["random"] = "random"
    min_tokens: Positive = Field(1, description="shortest cut")
    max_tokens: Positive = Field(4096, description="longest cut; lengths are uniform in between")

    @model_validator(mode="after")
    def _ordered(self) -> RandomSettings:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"stop.min_tokens {self.min_tokens} is larger than stop.max_tokens {self.max_tokens}; "
                "lower stop.min_tokens"
            )
        return self

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        if self.min_tokens > max_new_tokens:
            raise ValueError(
                f"stop.min_tokens {self.min_tokens} is longer than rollout.max_new_tokens {max_new_tokens}; "
                "lower stop.min_tokens"
            )


class NeverRule:
    """Plain on-policy distillation: every rollout runs to its end."""

    Settings: ClassVar[type[StopSettings]] = NeverSettings
    reason: StopReason | None = None
    needs_divergence = False

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls()

    def begin(self, request: RolloutRequest) -> None:
        return None

    def observe(self, request: RolloutRequest, divergences: Sequence[float]) -> Cut | None:
        return None

    def end(self, request: RolloutRequest, terminated: bool) -> None:
        return None

    def finish_step(self, collective: Collective, first_id: int, count: int) -> None:
        """Collective by contract; communicates nothing."""

    def metrics(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


class PrefixRule(NeverRule):
    """Ends every rollout after `tokens` tokens, and keeps them all (FastOPD, arXiv 2602.15260)."""

    Settings: ClassVar[type[StopSettings]] = PrefixSettings
    reason: StopReason | None = StopReason.PREFIX

    def __init__(self, tokens: int) -> None:
        assert tokens >= 1, f"tokens {tokens} is below 1"
        self._tokens = tokens
        self._seen: dict[int, int] = {}  # tokens of each open rollout, counted up to its length

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(settings.tokens)

    def length(self, request: RolloutRequest) -> int:
        """Tokens after which this rollout ends."""
        return self._tokens

    def begin(self, request: RolloutRequest) -> None:
        assert request.id not in self._seen, f"rollout {request.id} has begun already"
        self._seen[request.id] = 0

    def observe(self, request: RolloutRequest, divergences: Sequence[float]) -> Cut | None:
        """The cut, at exactly the length; none where the rollout ends there anyway (`max_new_tokens`)."""
        before, length = self._seen[request.id], self.length(request)
        now = self._seen[request.id] = min(length, before + len(divergences))
        return Cut(length, length) if before < now == length < request.max_new_tokens else None

    def end(self, request: RolloutRequest, terminated: bool) -> None:
        del self._seen[request.id]


class RandomRule(PrefixRule):
    """Ends every rollout at its own length, uniform in `min_tokens` .. `max_tokens`: a hash of (seed, rollout id)."""

    Settings: ClassVar[type[StopSettings]] = RandomSettings
    reason: StopReason | None = StopReason.RANDOM

    def __init__(self, seed: int, min_tokens: int, max_tokens: int) -> None:
        assert 1 <= min_tokens <= max_tokens, f"min_tokens {min_tokens} is not in 1 .. max_tokens {max_tokens}"
        super().__init__(max_tokens)
        self._seed = seed
        self._min_tokens = min_tokens

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(run.seed, settings.min_tokens, settings.max_tokens)

    def length(self, request: RolloutRequest) -> int:
        draw = counter.uniform(counter.key(self._seed, request.id, _STREAM), 0)
        return self._min_tokens + int(draw * (self._tokens - self._min_tokens + 1))
