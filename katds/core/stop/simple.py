"""Stop rules that look at nothing but the length: the baselines that KAT is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from katds.core import counter
from katds.core.collective import Collective
from katds.core.schedule import Schedule, progressed
from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.types import Cut, RolloutRequest
from katds.settings import Positive

# Keeps the lengths independent of other numbers drawn from (seed, rollout id), such as membership of the audit group.
_STREAM = 0x52414E44


class NeverSettings(StopSettings):
    """Every rollout runs to its end: plain on-policy distillation."""

    kind: Literal["never"] = "never"


class PrefixSettings(StopSettings):
    """Every rollout ends at the same length, which may grow over the run."""

    kind: Literal["prefix"] = "prefix"
    tokens: Positive = Field(1024, description="length at which every rollout ends")
    grow_from: Positive | None = Field(
        None,
        description="length in the first step; it grows to `tokens` in the last (POPD); null: no growth",
    )
    growth: Schedule = Field(
        "linear", description="how it grows: by equal steps, or along half a cosine; not published"
    )

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        if self.tokens > max_new_tokens:
            raise ValueError(
                f"stop.tokens {self.tokens} is longer than rollout.max_new_tokens {max_new_tokens}; lower stop.tokens"
            )
        if self.grow_from is None and self.growth != "linear":
            raise ValueError(
                f"stop.growth is {self.growth}, but stop.grow_from is null: nothing grows; give stop.grow_from"
            )
        if self.grow_from is not None and self.grow_from > self.tokens:
            raise ValueError(
                f"stop.grow_from {self.grow_from} is longer than stop.tokens {self.tokens}, where growth ends; lower stop.grow_from"
            )


class RandomSettings(StopSettings):
    """Every rollout ends at a random length: the control for saved tokens."""

    kind: Literal["random"] = "random"
    min_tokens: Positive = Field(1, description="shortest cut; not published")
    max_tokens: Positive | None = Field(
        None,
        description="longest cut; lengths are uniform in between; not published; default rollout.max_new_tokens",
    )

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        if self.max_tokens is not None and self.max_tokens > max_new_tokens:
            raise ValueError(
                f"stop.max_tokens {self.max_tokens} is longer than rollout.max_new_tokens {max_new_tokens}: rollouts would run to their "
                "end in place of the longest cuts; lower stop.max_tokens"
            )
        longest = "rollout.max_new_tokens" if self.max_tokens is None else "stop.max_tokens"
        if self.min_tokens > (limit := max_new_tokens if self.max_tokens is None else self.max_tokens):
            raise ValueError(
                f"stop.min_tokens {self.min_tokens} is larger than {longest} {limit}; lower stop.min_tokens"
            )


class NeverRule(StopRule):
    """Plain on-policy distillation (GKD, arXiv 2306.13649, on the student's own text): every rollout runs to its end."""

    Settings: ClassVar[type[StopSettings]] = NeverSettings
    reasons: tuple[str, ...] = ()
    needs_divergence = False

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls()


class PlannedRule(StopRule):
    """Base of rules that know where a rollout will be cut when it begins. `step` is that of the run."""

    needs_divergence = False

    def __init__(self) -> None:
        self.step = 0
        self._open: dict[int, tuple[Cut | None, int]] = {}  # by rollout id: its cut, and the tokens seen

    @abstractmethod
    def plan(self, request: RolloutRequest) -> Cut | None:
        """Where this rollout ends, should it be that long."""

    def begin(self, request: RolloutRequest) -> None:
        assert request.id not in self._open, f"rollout {request.id} has begun already"
        self._open[request.id] = (self.plan(request), 0)

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        """The cut, in the chunk that reaches it; none where the rollout ends there anyway (`max_new_tokens`)."""
        cut, before = self._open[request.id]
        now = before + len(tokens)
        self._open[request.id] = (cut, now)
        return cut if cut is not None and before < cut.at <= now and cut.at < request.max_new_tokens else None

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        del self._open[request.id]
        return None

    def finish_step(self, collective: Collective, first_id: int, count: int) -> None:
        """Collective by contract; communicates nothing."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state.get("step", 0)  # rules without growth did not save it once


class PrefixRule(PlannedRule):
    """Ends every rollout after `tokens` tokens, and keeps them all (FastOPD, arXiv 2602.15260; ESR, arXiv 2605.27028).

    With `grow_from` (POPD, arXiv 2605.31490: a prefix that grows over training) the first of the run's `steps` has that
    length and the last `tokens`. Open, and a setting: the schedule.
    """

    Settings: ClassVar[type[StopSettings]] = PrefixSettings
    reasons: tuple[str, ...] = ("prefix",)

    def __init__(self, tokens: int, grow_from: int | None = None, steps: int = 1, growth: Schedule = "linear") -> None:
        super().__init__()
        first = tokens if grow_from is None else grow_from
        assert 1 <= first <= tokens, f"grow_from {grow_from} is not in 1 .. tokens {tokens}"
        self._tokens, self._first, self._steps, self._growth = tokens, first, steps, growth

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(settings.tokens, settings.grow_from, run.steps, settings.growth)

    def length(self, request: RolloutRequest) -> int:
        """Tokens after which this rollout ends."""
        grown, last = self._tokens - self._first, max(self._steps - 1, 1)
        if self._growth == "linear":  # in whole numbers
            return self._first + grown * self.step // last
        return self._first + round(grown * progressed(self.step / last, self._growth))

    def plan(self, request: RolloutRequest) -> Cut | None:
        length = self.length(request)
        return Cut(length, length, self.reasons[0])


class RandomRule(PlannedRule):
    """Ends every rollout at its own length, uniform in `min_tokens` .. `max_tokens`: a hash of (seed, rollout id). The random control of
    KAT's paper (arXiv 2606.09471), whose lengths are not published. Without `max_tokens` the longest is the rollout's own limit, which is
    what a prefix that the teacher wrote has left of it."""

    Settings: ClassVar[type[StopSettings]] = RandomSettings
    reasons: tuple[str, ...] = ("random",)

    def __init__(self, seed: int, min_tokens: int, max_tokens: int | None = None) -> None:
        assert min_tokens >= 1, f"min_tokens is {min_tokens}"
        assert max_tokens is None or min_tokens <= max_tokens, (
            f"min_tokens {min_tokens} is above max_tokens {max_tokens}"
        )
        super().__init__()
        self._seed, self._min_tokens, self._max_tokens = seed, min_tokens, max_tokens

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(run.seed, settings.min_tokens, settings.max_tokens)

    def length(self, request: RolloutRequest) -> int:
        """Tokens after which this rollout ends."""
        draw = counter.uniform(counter.key(self._seed, request.id, _STREAM), 0)
        longest = max(self._min_tokens, request.max_new_tokens) if self._max_tokens is None else self._max_tokens
        return self._min_tokens + int(draw * (longest - self._min_tokens + 1))

    def plan(self, request: RolloutRequest) -> Cut | None:
        length = self.length(request)
        return Cut(length, length, self.reasons[0])
