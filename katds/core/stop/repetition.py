"""End a rollout that says the same thing again and again: the common heuristic against loops.

Inference servers end such requests (e.g. `repetition_detection` of vLLM). It sees one kind of KAT's traps, in the text alone:
no teacher is needed. [open]: no source gives numbers for distillation; the defaults are ours, unmeasured.

Invariants: the cut does not depend on chunks; it keeps what precedes the loop and one copy of what is repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.types import Cut, RolloutRequest
from katds.settings import Positive


class RepetitionSettings(StopSettings):
    """End a rollout that repeats itself word for word."""

    kind: Literal["repetition"] = "repetition"
    max_period: Positive = Field(64, description="longest text, in tokens, whose repetition is noticed")
    repeats: Annotated[int, Field(ge=2)] = Field(4, description="copies in a row that end a rollout; the first is kept")
    min_tokens: Positive = Field(
        32, description="tokens that the copies must have together: zeros in a number or a ruled line are no loop yet"
    )

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        for name, value in (("repeats", self.repeats), ("min_tokens", self.min_tokens)):
            if value >= max_new_tokens:
                raise ValueError(
                    f"stop.{name} {value} leaves nothing to end below rollout.max_new_tokens {max_new_tokens}; lower stop.{name}"
                )


class Loop:
    """Watches a text, token by token, for the end of a loop: some period p <= max_period with which its last
    max(repeats x p, min_tokens) tokens repeat.

    Memory: one number per token. Cost per token: the places of the same token among the last `max_period`; few in a text
    (measured 0.7 us with Zipf's frequencies), at most all of them.
    """

    __slots__ = ("_max_period", "_min_tokens", "_places", "_repeats", "_runs", "tokens")

    def __init__(self, max_period: int, repeats: int, min_tokens: int) -> None:
        self._max_period, self._repeats, self._min_tokens = max_period, repeats, min_tokens
        self._places: dict[int, deque[int]] = {}  # of each token, where it was last, oldest first
        self._runs: dict[
            int, int
        ] = {}  # by period p: so many last tokens equal those p before them; zeros are left out
        self.tokens = 0

    def closes(self, token: int) -> int | None:
        """Reads a token; returns the tokens of the loop that it completes without the first copy, or None. Of several periods
        the shortest counts."""
        places = self._places.setdefault(token, deque(maxlen=self._max_period))
        runs, found = {}, None
        for place in reversed(places):
            period = self.tokens - place
            if period > self._max_period:
                break
            run = runs[period] = self._runs.get(period, 0) + 1
            if found is None and run + period >= max(self._repeats * period, self._min_tokens):
                found = run
        places.append(self.tokens)
        self._runs = runs
        self.tokens += 1
        return found


class RepetitionRule(StopRule):
    """Ends a rollout with the token that completes a loop, and keeps what precedes the second copy.

    Args:
        max_period: tokens of the longest copy.
        repeats: copies that make a loop, at least 2.
        min_tokens: of all copies together; a loop of short copies needs more of them.
    """

    Settings: ClassVar[type[StopSettings]] = RepetitionSettings
    reasons: tuple[str, ...] = ("repetition",)
    needs_divergence = False

    def __init__(self, max_period: int, repeats: int, min_tokens: int) -> None:
        assert max_period >= 1 and repeats >= 2, f"max_period {max_period} is below 1, or repeats {repeats} below 2"
        self._settings = (max_period, repeats, min_tokens)
        self._loops: dict[int, Loop | None] = {}  # by rollout id; None once it is cut

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(settings.max_period, settings.repeats, settings.min_tokens)

    def begin(self, request: RolloutRequest) -> None:
        assert request.id not in self._loops, f"rollout {request.id} has begun already"
        self._loops[request.id] = Loop(*self._settings)

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        loop = self._loops[request.id]
        if loop is None:
            return None
        for token in tokens:
            copies = loop.closes(token)
            if copies is not None:
                self._loops[request.id] = None
                return Cut(loop.tokens - copies, loop.tokens, self.reasons[0])
        return None

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        del self._loops[request.id]
        return None
