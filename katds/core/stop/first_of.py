"""Several stop rules at once: the first cut wins.

Invariants: a rule's state is what it would be if the tokens behind the first cut had never been, as with any rule; an audit
rollout is observed by all rules to its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from katds.core.collective import Collective
from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.types import Cut, RolloutRequest
from katds.errors import ConfigError
from katds.settings import ByKind, Section


def _known() -> dict[str, type[StopRule]]:
    from katds.core.stop import STOP_RULES  # which lists this rule

    return STOP_RULES


def _others() -> dict[str, type[Section]]:
    return {kind: rule.Settings for kind, rule in _known().items() if rule is not FirstOfRule}


AnyOther = Annotated[StopSettings, ByKind(_others)]


class FirstOfSettings(StopSettings):
    """End a rollout where the first of several rules does."""

    kind: Literal["first_of"] = "first_of"
    rules: Annotated[list[AnyOther], Field(min_length=1)] = Field(
        description="sections like this one, each with its kind: [{kind: kat}, {kind: prefix, tokens: 2048}]; of two cuts at the same "
        "token that of the rule named first counts",
    )

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        for i, rule in enumerate(self.rules):
            try:
                rule.check(max_new_tokens, temperature, audit_fraction)
            except ValueError as error:
                raise ValueError(_placed(str(error), i)) from None
            if rule.leaves_hole:
                raise ValueError(
                    f"stop.rules[{i}] ends no rollout but leaves a hole in it; make it the only stop rule, or remove it"
                )
        supports = {
            "teacher_top_k" if rule.reads_teacher_top_k else "student_top_k"
            for rule in self.rules
            if rule.reads_divergence
        }
        if len(supports) > 1:
            raise ValueError(
                f"stop.rules reads two divergences (support {' and '.join(sorted(supports))}); give one of them to all"
            )

    @property
    def reads_divergence(self) -> bool:
        return any(rule.reads_divergence for rule in self.rules)

    @property
    def reads_teacher_top_k(self) -> bool:
        return any(rule.reads_teacher_top_k for rule in self.rules)

    def contents(self) -> str:
        found = []
        for i, rule in enumerate(self.rules):
            try:
                found.append(rule.contents())
            except ConfigError as error:
                raise ConfigError(_placed(str(error), i)) from None
        return " ".join(filter(None, found))

    def doubts(self, run: RunFacts) -> list[str]:
        return [f"stop.rules[{i}]: {doubt}" for i, rule in enumerate(self.rules) for doubt in rule.doubts(run)]

    def choices(self, run: RunFacts) -> list[str]:
        return [_placed(choice, i) for i, rule in enumerate(self.rules) for choice in rule.choices(run)]


def _placed(message: str, i: int) -> str:
    """The message of a rule that takes itself for the only one: its settings by the names that they have in the list."""
    return re.sub(r"\bstop\.(?=\w)", f"stop.rules[{i}].", message)


class FirstOfRule(StopRule):
    """Delegates to `rules`; the cut with the smallest `at` wins, and among those the rule that comes first.

    A rule that is looking for its cut must not see behind that of another, which is known only when all have seen the token:
    until the first cut, tokens are shown one by one. Measured with kat and prefix: 4 us per token, where kat alone takes 0.1.
    """

    Settings: ClassVar[type[StopSettings]] = FirstOfSettings

    def __init__(self, rules: Sequence[StopRule]) -> None:
        self.rules = list(rules)
        self.reasons = tuple(dict.fromkeys(reason for rule in rules for reason in rule.reasons))
        self.needs_divergence = any(rule.needs_divergence for rule in rules)
        self.reads_teacher_top_k = any(rule.reads_teacher_top_k for rule in rules)
        self._winner: dict[int, int | None] = {}  # by rollout id: the place of the rule whose cut came first

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        by_settings = {rule.Settings: rule for rule in _known().values()}
        return cls([by_settings[type(section)].from_settings(section, run) for section in settings.rules])

    def begin(self, request: RolloutRequest) -> None:
        self._winner[request.id] = None
        for rule in self.rules:
            rule.begin(request)

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        at, made = 0, None
        while at < len(tokens) and self._winner[request.id] is None:
            cuts = self._show(request, tokens[at : at + 1], divergences[at : at + 1])
            self._winner[request.id] = next((i for i, cut in enumerate(cuts) if cut is not None), None)
            made = next(filter(None, cuts), None)
            at += 1
        if request.audit:
            self._show(request, tokens[at:], divergences[at:])
        return made

    def _show(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> list[Cut | None]:
        """Every rule sees the tokens; what each says."""
        return [rule.observe(request, tokens, divergences) for rule in self.rules]

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        """No hole: what lies behind the cut of another rule would move it in the audit group alone.

        A rollout that one rule has ended is complete for the others, as one that has reached its maximum length is: else KAT's
        threshold, beside a prefix, would come from the short rollouts alone.
        """
        winner = self._winner.pop(request.id)
        holes = [rule.end(request, terminated and i == winner) for i, rule in enumerate(self.rules)]
        assert not any(holes), f"rollout {request.id} has the holes {holes} under several rules"
        return None

    def finish_step(self, collective: Collective, first_id: int, count: int) -> None:
        """Collective: what each rule sends, in order."""
        for rule in self.rules:
            rule.finish_step(collective, first_id, count)

    def metrics(self) -> Mapping[str, float]:
        """Those of all rules. A second rule of a kind gets its place in the list behind its names, e.g. `kat/threshold/1`."""
        scalars: dict[str, float] = {}
        kinds = [type(rule) for rule in self.rules]
        for i, rule in enumerate(self.rules):
            suffix = f"/{i}" if kinds[i] in kinds[:i] else ""
            scalars |= {key + suffix: value for key, value in rule.metrics().items()}
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {"rules": [rule.state_dict() for rule in self.rules]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for rule, own in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(own)
