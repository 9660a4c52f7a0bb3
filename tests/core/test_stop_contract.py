"""What every stop rule promises (`katds.core.stop.base`), for each line of STOP_RULES; a new rule is tested unasked."""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from pydantic import TypeAdapter

from katds.config import StopConfig
from katds.core.collective import Solo
from katds.core.stop import STOP_RULES
from katds.core.stop.base import RunFacts, StopRule
from katds.core.types import Cut, Prompt, RolloutRequest

LONGEST = 60
ROLLOUTS = 12
# What a rule needs to act within LONGEST tokens; a rule that is not named runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "kat": {
        "window": 4,
        "stride": 1,
        "persistence": 2,
        "min_kept": 3,
        "threshold": {"min_entries": 2, "min_steps": 1, "eta": 0.2},
    },
    "prefix": {"tokens": 20},
    "random": {"max_tokens": 50},
}
ACTIVE = sorted(set(STOP_RULES) - {"never"})
each_rule = pytest.mark.parametrize("kind", sorted(STOP_RULES))
some_seeds = settings(max_examples=25)


def make(kind: str) -> StopRule:
    section = TypeAdapter(StopConfig).validate_python({"kind": kind, **SMALL.get(kind, {})})
    return STOP_RULES[kind].from_settings(section, RunFacts(11, 100, 16, 1, 0.25))


def requests_of(step: int) -> list[RolloutRequest]:
    prompt = Prompt(index=0, token_ids=(1,))
    return [RolloutRequest(step * ROLLOUTS + i, prompt, LONGEST, audit=i % 4 == 0) for i in range(ROLLOUTS)]


def divergences_of(asked: RolloutRequest, seed: int) -> list[float]:
    """A rollout of its own length that may fall into a trap."""
    rng = random.Random(seed * 1000 + asked.id)
    length, onset = rng.randint(1, LONGEST), rng.randint(0, LONGEST)
    return [rng.expovariate(1.0) * (0.05 if t >= onset else 1.0) for t in range(length)]


def write(rule: StopRule, asked: RolloutRequest, d: list[float], chunks: random.Random | None) -> Cut | None:
    """As the engine: `chunks` splits at random (None: whole), and a cut ends all but audit rollouts."""
    rule.begin(asked)
    cut, start = None, 0
    while start < len(d) and (cut is None or asked.audit):
        end = len(d) if chunks is None else start + chunks.randint(0, 9)
        verdict = rule.observe(asked, d[start:end])
        assert cut is None or verdict is None, "a rule speaks once"
        cut, start = cut or verdict, end
    rule.end(asked, terminated=cut is not None and not asked.audit)
    return cut


def play(rule: StopRule, collective: Any, steps: range, seed: int, chunks: random.Random | None = None) -> list[Any]:
    """Cuts, metrics and state of the rollouts that fall to this rank, step by step."""
    story = []
    for step in steps:
        asked = requests_of(step)
        mine = [a for a in asked if (a.id * 7 + seed) % collective.size == collective.rank]
        cuts = {a.id: write(rule, a, divergences_of(a, seed), chunks) for a in mine}
        rule.finish_step(collective, asked[0].id, len(asked))
        story.append((cuts, dict(rule.metrics()), json.loads(json.dumps(rule.state_dict()))))
    return story


@each_rule
def test_the_contract_is_declared(kind: str) -> None:
    rule = make(kind)
    assert isinstance(rule.needs_divergence, bool)
    assert (rule.reason is None) == (kind == "never")
    assert rule.reason is None or rule.reason.value == kind  # the metric stop/<reason> carries the recipe's word


def test_every_kind_of_the_recipe_has_a_rule() -> None:
    sections = get_args(get_args(StopConfig)[0])
    assert {section.model_fields["kind"].default for section in sections} == set(STOP_RULES)


@pytest.mark.parametrize("kind", ACTIVE)
def test_these_tests_see_cuts(kind: str) -> None:
    cuts = [cut for step in play(make(kind), Solo(), range(3), seed=0) for cut in step[0].values()]
    made = [cut for cut in cuts if cut is not None]
    assert len(made) >= 3
    assert len(made) < len(cuts)


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000), split=st.integers(0, 10_000))
def test_chunks_do_not_matter(kind: str, seed: int, split: int) -> None:
    whole = play(make(kind), Solo(), range(3), seed)
    assert play(make(kind), Solo(), range(3), seed, random.Random(split)) == whole


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_a_cut_lies_within_what_was_written(kind: str, seed: int) -> None:
    for step, (cuts, _, _) in enumerate(play(make(kind), Solo(), range(3), seed)):
        for asked in requests_of(step):
            cut = cuts[asked.id]
            assert cut is None or 0 <= cut.kept <= cut.at <= len(divergences_of(asked, seed))


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_a_resumed_rule_goes_on_bit_for_bit(kind: str, seed: int) -> None:
    straight = play(make(kind), Solo(), range(4), seed)
    first = make(kind)
    play(first, Solo(), range(2), seed)
    resumed = make(kind)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert play(resumed, Solo(), range(2, 4), seed) == straight[2:]


@pytest.mark.parametrize("kind", ACTIVE)
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_nothing_after_the_cut_changes_the_rule(kind: str, seed: int) -> None:
    """A large chunk brings tokens that would not exist with small ones; even wild ones leave no trace."""

    def story(wild: list[float]) -> list[Any]:
        rule = make(kind)
        play(rule, Solo(), range(1), seed)
        told: list[Any] = []
        for asked in requests_of(1):
            d = divergences_of(asked, seed)
            rule.begin(asked)
            cut = rule.observe(asked, d)
            if cut is not None and not asked.audit:
                told.append(rule.observe(asked, wild))
            rule.end(asked, terminated=cut is not None and not asked.audit)
        rule.finish_step(Solo(), ROLLOUTS, ROLLOUTS)
        return [told, rule.metrics(), rule.state_dict()]

    quiet, loud = story([]), story([-50.0] * 40)
    assert loud == quiet
    assert all(verdict is None for verdict in loud[0])


@each_rule
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 4))
def test_ranks_agree_with_one_process(kind: str, seed: int, size: int) -> None:
    alone = play(make(kind), Solo(), range(3), seed)

    def rank_story(rank: LocalRank) -> list[Any]:
        return play(make(kind), rank, range(3), seed)

    stories = run_local(size, rank_story)
    for step, (cuts, metrics, state) in enumerate(alone):
        assert all(story[step][1:] == (metrics, state) for story in stories)
        joined = {id: cut for story in stories for id, cut in story[step][0].items()}
        assert joined == cuts
