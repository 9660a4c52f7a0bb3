"""Several stop rules at once, against each of them alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from katds.config import StopConfig
from katds.core.collective import Solo
from katds.core.stop.base import RunFacts, StopRule
from katds.core.stop.first_of import FirstOfRule
from katds.core.stop.kat import KatRule
from katds.core.stop.repetition import RepetitionRule
from katds.core.stop.simple import NeverRule, PrefixRule, RandomRule
from katds.core.threshold import AdaptiveThreshold
from katds.core.types import Cut, Prompt, RolloutRequest

PARTS = ("kat", "repetition", "random", "prefix", "never")


def part(name: str) -> StopRule:
    if name == "kat":
        threshold = AdaptiveThreshold(0.3, 64, 1, 0)
        threshold.value = 0.5
        return KatRule(4, 1, 2, 3, threshold, "all")
    rules = {
        "repetition": lambda: RepetitionRule(3, 2, 4),
        "random": lambda: RandomRule(3, 5, 80),
        "prefix": lambda: PrefixRule(30),
        "never": NeverRule,
    }
    return rules[name]()


def request(id: int, audit: bool = False) -> RolloutRequest:
    return RolloutRequest(id, Prompt(0, (1,)), 70, audit)


def text(id: int, length: int, seed: int) -> tuple[list[int], list[float]]:
    rng = random.Random(seed * 100 + id)
    onset = rng.randint(0, 2 * length)
    return [rng.randint(0, 3) for _ in range(length)], [
        rng.expovariate(1.0) * (0.1 if t > onset else 2.0) for t in range(length)
    ]


def play(rule: StopRule, asked: RolloutRequest, tokens: list[int], d: list[float], chunk: int) -> Cut | None:
    rule.begin(asked)
    cut = None
    for start in range(0, len(d), chunk):
        verdict = rule.observe(asked, tokens[start : start + chunk], d[start : start + chunk])
        assert cut is None or verdict is None
        cut = cut or verdict
        if cut is not None and not asked.audit:
            break
    assert rule.end(asked, cut is not None and not asked.audit) is None
    return cut


@settings(max_examples=200)
@given(
    names=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    length=st.integers(1, 70), seed=st.integers(0, 999), chunk=st.integers(1, 80), audit=st.booleans(),
)  # fmt: skip
def test_the_first_cut_of_all_wins(names: list[str], length: int, seed: int, chunk: int, audit: bool) -> None:
    asked, (tokens, d) = request(seed, audit), text(seed, length, seed)
    alone = [play(part(name), asked, tokens, d, chunk) for name in names]
    made = [cut for cut in alone if cut is not None]
    expected = min(made, key=lambda cut: cut.at) if made else None  # min takes the first of equals
    assert play(FirstOfRule([part(name) for name in names]), asked, tokens, d, chunk) == expected


def test_a_tie_goes_to_the_rule_that_is_named_first() -> None:
    tokens, d = [0] * 40, [1.0] * 40
    loop, prefix = RepetitionRule(1, 2, 9), PrefixRule(9)
    assert play(FirstOfRule([loop, prefix]), request(0), tokens, d, 40) == Cut(1, 9, "repetition")
    loop, prefix = RepetitionRule(1, 2, 9), PrefixRule(9)
    assert play(FirstOfRule([prefix, loop]), request(0), tokens, d, 40) == Cut(9, 9, "prefix")


@settings(max_examples=50)
@given(seed=st.integers(0, 999), chunk=st.integers(1, 80))
def test_a_rule_does_not_see_behind_the_cut_of_another(seed: int, chunk: int) -> None:
    """KAT's minimum is that of the text up to the prefix, as if nothing had been written behind it."""
    both, alone = FirstOfRule([part("kat"), PrefixRule(12)]), part("kat")
    tokens, d = text(0, 60, seed)
    cut = play(both, request(0), tokens, d, chunk)
    assert cut is not None and cut.at <= 12
    play(alone, request(0), tokens, d[:12], 80)
    for rule in (both, alone):
        rule.finish_step(Solo(), 0, 1)
    assert both.state_dict()["rules"][0] == alone.state_dict()


def test_an_audit_rollout_is_observed_to_its_end_by_all() -> None:
    both, alone = FirstOfRule([PrefixRule(12), part("kat")]), part("kat")
    tokens, d = [1] * 60, [3.0] * 40 + [1.0] * 20
    assert play(both, request(0, audit=True), tokens, d, 7) == Cut(12, 12, "prefix")
    play(alone, request(0, audit=True), tokens, d, 7)
    for rule in (both, alone):
        rule.finish_step(Solo(), 0, 1)
    assert both.state_dict()["rules"][1] == alone.state_dict()
    assert both.metrics()["kat/min_window"] == pytest.approx(1.0)


def test_what_a_prefix_ends_is_complete_for_kat_as_what_the_maximum_length_ends() -> None:
    """The same texts give the same threshold; what KAT has ended itself is in neither."""

    def pushed(rule: StopRule, kat: KatRule, limit: int) -> list[float]:
        texts = [[1.0] * 9, [1.0] * 7 + [0.6] * 23, [1.0] * 6 + [0.2] * 24, [0.9] * 30]
        for i, text in enumerate(texts):
            play(rule, request(i), [0] * min(len(text), limit), text[:limit], 5)
        rule.finish_step(Solo(), 0, len(texts))
        minima: list[float] = kat.state_dict()["minima"]
        return minima

    def kat() -> KatRule:
        threshold = AdaptiveThreshold(0.3, 64, 1, 0)
        threshold.value = 0.5
        return KatRule(4, 1, 2, 3, threshold, "completed")

    first, second = kat(), kat()
    assert pushed(FirstOfRule([first, PrefixRule(12)]), first, 30) == pushed(second, second, 12)
    assert first.state_dict()["minima"] == [1.0, 0.6, 0.9], "the third is ended by KAT"


def test_reasons_needs_and_metrics_are_those_of_all() -> None:
    rule = FirstOfRule([part("kat"), part("prefix"), part("kat"), part("random")])
    assert rule.reasons == ("kat", "prefix", "random") and rule.needs_divergence
    assert not FirstOfRule([part("prefix"), part("repetition")]).needs_divergence
    assert rule.metrics() == {"kat/entries": 0.0, "kat/threshold": 0.5, "kat/entries/2": 0.0, "kat/threshold/2": 0.5}


def section(**settings: Any) -> Any:
    return TypeAdapter(StopConfig).validate_python({"kind": "first_of", **settings})


def test_contradictions_are_named_by_their_place() -> None:
    two = section(rules=[{"kind": "kat"}, {"kind": "prefix", "tokens": 500}])
    with pytest.raises(ValueError, match=r"^stop.rules\[0\].min_kept 128 .* lower stop.rules\[0\].min_kept$"):
        two.check(100, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"^stop.rules\[1\].tokens 500 .*; lower stop.rules\[1\].tokens$"):
        two.check(400, 1.0, 0.1)
    two.check(500, 1.0, 0.1)


def test_rules_read_one_divergence() -> None:
    of_teacher = {"kind": "kat", "support": "teacher_top_k"}
    both = section(rules=[of_teacher, {"kind": "prefix", "tokens": 500}, of_teacher | {"window": 32}])
    both.check(1000, 1.0, 0.1)
    assert (
        both.reads_teacher_top_k and FirstOfRule.from_settings(both, RunFacts(0, 30, 128, 1, 0.1)).reads_teacher_top_k
    )
    alone = section(rules=[{"kind": "kat"}, {"kind": "prefix", "tokens": 500}])
    assert (
        not alone.reads_teacher_top_k
        and not FirstOfRule.from_settings(alone, RunFacts(0, 30, 128, 1, 0.1)).reads_teacher_top_k
    )
    with pytest.raises(ValueError, match=r"support student_top_k and teacher_top_k\); give one of them to all"):
        section(rules=[of_teacher, {"kind": "kat"}]).check(1000, 1.0, 0.1)


def test_a_rule_that_leaves_holes_stands_alone() -> None:
    rules = [{"kind": "prefix", "tokens": 500}, {"kind": "kat", "supervise": "after"}]
    with pytest.raises(ValueError, match=r"stop.rules\[1\] ends no rollout but leaves a hole"):
        section(rules=rules).check(4096, 1.0, 0.1)


def test_what_a_rule_will_not_do_is_told_by_its_place() -> None:
    rules = [{"kind": "prefix", "tokens": 9}, {"kind": "kat"}]
    section = TypeAdapter(StopConfig).validate_python({"kind": "first_of", "rules": rules})
    (doubt,) = section.doubts(RunFacts(0, 3, 128, 1, 1 / 16))
    assert doubt.startswith("stop.rules[1]: stop.kind kat will end no rollout")
    (choice,) = section.choices(RunFacts(0, 3, 128, 1, 1 / 16))
    assert choice.startswith("stop.rules[1].threshold.source auto is completed")
