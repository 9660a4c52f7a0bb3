"""Never, prefix and random: the baselines that count tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katds.core import counter
from katds.core.collective import Solo
from katds.core.stop.base import RunFacts, StopRule
from katds.core.stop.simple import NeverRule, PrefixRule, PrefixSettings, RandomRule, RandomSettings
from katds.core.types import Cut, Prompt, RolloutRequest

PROMPT = Prompt(index=0, token_ids=(1,))


def request(id: int = 0, audit: bool = False, max_new_tokens: int = 100) -> RolloutRequest:
    return RolloutRequest(id=id, prompt=PROMPT, max_new_tokens=max_new_tokens, audit=audit)


def cuts(rule: StopRule, asked: RolloutRequest, chunks: list[int]) -> list[Cut | None]:
    rule.begin(asked)
    verdicts = [rule.observe(asked, [0] * n, [0.0] * n) for n in chunks]
    rule.end(asked, terminated=False)
    return verdicts


def test_never_cuts_nothing_and_gives_no_reason() -> None:
    assert cuts(NeverRule(), request(), [50, 50]) == [None, None]
    assert NeverRule.reasons == ()


@given(st.integers(1, 60), st.lists(st.integers(0, 30), max_size=8), st.booleans())
def test_prefix_cuts_once_in_the_chunk_that_reaches_it(tokens: int, chunks: list[int], audit: bool) -> None:
    verdicts = cuts(PrefixRule(tokens), request(audit=audit, max_new_tokens=61), chunks)
    made = [v for v in verdicts if v is not None]
    assert made == ([Cut(tokens, tokens, "prefix")] if sum(chunks) >= tokens else [])
    if made:
        i = verdicts.index(made[0])
        assert sum(chunks[:i]) < tokens <= sum(chunks[: i + 1])


@pytest.mark.parametrize(("tokens", "expected"), [(99, Cut(99, 99, "prefix")), (100, None), (101, None)])
def test_a_rollout_that_ends_there_anyway_is_not_cut(tokens: int, expected: Cut | None) -> None:
    assert cuts(PrefixRule(tokens), request(max_new_tokens=100), [100]) == [expected]


@given(st.integers(1, 300), st.data(), st.integers(1, 40))
def test_a_growing_prefix_is_a_line_over_the_run(tokens: int, data: st.DataObject, steps: int) -> None:
    first = data.draw(st.integers(1, tokens))
    settings = PrefixSettings(tokens=tokens, grow_from=first)
    rule = PrefixRule.from_settings(settings, RunFacts(0, steps, 8, 1, 0.0))
    lengths = []
    for _ in range(steps):
        lengths.append(rule.length(request()))
        rule.finish_step(Solo(), 0, 8)
    assert lengths[0] == first and (steps == 1 or lengths[-1] == tokens)
    for step, length in enumerate(lengths):
        line = first + (tokens - first) * step / max(steps - 1, 1)
        assert line - 1 < length <= line


def test_a_prefix_may_grow_along_a_cosine() -> None:
    rule = PrefixRule.from_settings(
        PrefixSettings(tokens=110, grow_from=10, growth="cosine"), RunFacts(0, 7, 8, 1, 0.0)
    )
    lengths = []
    for step in range(7):
        lengths.append(rule.length(request()))
        rule.finish_step(Solo(), step, 1)
    assert lengths == [10, 17, 35, 60, 85, 103, 110]  # 10 + 50 (1 - cos(pi k / 6))


def test_a_prefix_does_not_grow_unless_asked() -> None:
    rule = PrefixRule.from_settings(PrefixSettings(tokens=9), RunFacts(0, 5, 8, 1, 0.0))
    for _ in range(5):
        assert rule.length(request()) == 9
        rule.finish_step(Solo(), 0, 8)


def test_a_resumed_prefix_has_the_length_of_its_step() -> None:
    def made() -> PrefixRule:
        return PrefixRule(50, grow_from=10, steps=5)

    rule, resumed = made(), made()
    for _ in range(3):
        rule.finish_step(Solo(), 0, 8)
    resumed.load_state_dict(rule.state_dict())
    assert cuts(resumed, request(), [100]) == cuts(rule, request(), [100]) == [Cut(40, 40, "prefix")]


def test_a_prefix_that_would_shrink_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop.growth is cosine, but stop.grow_from is null"):
        PrefixSettings(tokens=8, growth="cosine").check(100, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stop.grow_from 9 is longer than stop.tokens 8"):
        PrefixSettings(tokens=8, grow_from=9).check(100, 1.0, 0.0)


def test_random_lengths_are_uniform_between_their_bounds() -> None:
    rule = RandomRule(seed=3, min_tokens=4, max_tokens=7)
    drawn = Counter(rule.length(request(id)) for id in range(4000))
    assert sorted(drawn) == [4, 5, 6, 7]
    assert max(abs(n - 1000) for n in drawn.values()) < 140  # five standard deviations


def test_random_lengths_depend_on_seed_and_id_only() -> None:
    def lengths(seed: int) -> list[int]:
        return [RandomRule(seed, 1, 4096).length(request(id)) for id in range(50)]

    assert lengths(0) == lengths(0)
    assert sum(a == b for a, b in zip(lengths(0), lengths(1), strict=True)) < 5
    assert len(set(lengths(0))) > 40
    assert RandomRule(0, 9, 9).length(request(1)) == 9


def test_random_lengths_reach_as_far_as_a_rollout() -> None:
    """Without a longest cut: a control whose cuts lay behind the rollouts' end would save nothing."""
    rule, requests = RandomRule(seed=0, min_tokens=1), [request(id) for id in range(400)]
    (limit,) = {each.max_new_tokens for each in requests}
    drawn = [rule.length(each) for each in requests]
    assert 0.95 * limit < max(drawn) <= limit and sum(drawn) / 400 == pytest.approx((1 + limit) / 2, rel=0.15)
    RandomSettings(max_tokens=60).check(60, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stop.max_tokens 61 is longer than rollout.max_new_tokens 60"):
        RandomSettings(max_tokens=61).check(60, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stop.min_tokens 61 is larger than rollout.max_new_tokens 60"):
        RandomSettings(min_tokens=61).check(60, 1.0, 0.0)


def test_random_lengths_do_not_follow_a_choice_by_the_same_seed_and_id() -> None:
    """An audit group drawn from (seed, id) must not hold the short or the long rollouts."""
    rule = RandomRule(seed=0, min_tokens=1, max_tokens=1000)
    chosen = [id for id in range(8000) if counter.uniform(counter.key(0, id), 0) < 1 / 16]
    mean = sum(rule.length(request(id)) for id in chosen) / len(chosen)
    assert len(chosen) > 400
    assert mean == pytest.approx(500, abs=65)  # five standard errors


def test_random_cuts_at_its_length() -> None:
    rule = RandomRule(seed=0, min_tokens=1, max_tokens=90)
    for id in range(20):
        n = rule.length(request(id))
        assert cuts(rule, request(id), [n - 1, 1, 5]) == [None, Cut(n, n, "random"), None]


@pytest.mark.parametrize(("low", "high"), [(0, 5), (6, 5)])
def test_impossible_lengths_are_refused(low: int, high: int) -> None:
    with pytest.raises(AssertionError):
        RandomRule(0, low, high)
