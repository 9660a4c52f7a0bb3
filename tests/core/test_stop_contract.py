"""What every stop rule promises (`katds.core.stop.base`), for each line of STOP_RULES; a new rule is tested unasked."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from pydantic import TypeAdapter

from katds.config import StopConfig
from katds.core.collective import Solo
from katds.core.stop import STOP_RULES
from katds.core.stop.base import RunFacts, StopRule
from katds.core.types import EOS, LENGTH, Cut, Prompt, RolloutRequest

LONGEST = 60
ROLLOUTS = 12
STEPS = 4
KAT: dict[str, Any] = {
    "kind": "kat",
    "window": 4,
    "stride": 1,
    "persistence": 2,
    "min_kept": 3,
    "threshold": {"min_entries": 2, "min_steps": 1, "eta": 0.2},
}
LOOPS = {"kind": "repetition", "max_period": 5, "repeats": 2, "min_tokens": 6}
# What a rule needs to act within LONGEST tokens, one or several ways; a rule that is not named runs with its defaults.
WAYS: dict[str, dict[str, Any]] = {
    "kat": KAT,
    "kat agreement": KAT | {"supervise": "agreement"},
    "kat after": KAT | {"supervise": "after"},
    "kat of teacher": KAT | {"support": "teacher_top_k"},
    "prefix": {"tokens": 20},
    "prefix growing": {"tokens": 40, "grow_from": 5},
    "random": {"max_tokens": 50},
    "repetition": LOOPS,
    "replay": {"run": str(Path(__file__).parent / "recorded_run")},
    "first_of": {"rules": [LOOPS, KAT, {"kind": "random", "min_tokens": 30}]},
    "first_of kats": {"rules": [KAT, KAT | {"window": 6, "threshold": KAT["threshold"] | {"source": "all"}}]},
}
CASES = sorted({*STOP_RULES, *WAYS})
CUTTING = sorted(set(CASES) - {"never", "kat after"})
each_rule = pytest.mark.parametrize("case", CASES)
each_cutting_rule = pytest.mark.parametrize("case", CUTTING)
some_seeds = settings(max_examples=25)
Text = tuple[list[int], list[float]]  # token ids and divergences of a response


def make(case: str) -> StopRule:
    kind = case.split()[0]
    section = TypeAdapter(StopConfig).validate_python(WAYS.get(case, {}) | {"kind": kind})
    section.check(LONGEST, 1.0, 0.25)
    rule = STOP_RULES[kind].from_settings(section, RunFacts(11, STEPS, 16, 1, 0.25))
    assert rule.needs_divergence == section.reads_divergence and rule.reads_teacher_top_k == section.reads_teacher_top_k
    return rule


def requests_of(step: int) -> list[RolloutRequest]:
    prompt = Prompt(index=0, token_ids=(1,))
    return [RolloutRequest(step * ROLLOUTS + i, prompt, LONGEST, audit=i % 4 == 0) for i in range(ROLLOUTS)]


def text_of(asked: RolloutRequest, seed: int) -> Text:
    """A rollout of its own length that may fall into a trap, come out of it, and fall into a loop."""
    rng = random.Random(seed * 1000 + asked.id)
    length, onset, trap = rng.randint(1, LONGEST), rng.randint(0, LONGEST), rng.randint(5, LONGEST)
    divergences = [rng.expovariate(1.0) * (0.05 if onset <= t < onset + trap else 1.0) for t in range(length)]
    loop, period = rng.randint(0, LONGEST), rng.randint(1, 4)
    tokens: list[int] = []
    for t in range(length):
        tokens.append(tokens[t - period] if t >= loop + period else rng.randrange(50))
    return tokens, divergences


def write(rule: StopRule, asked: RolloutRequest, text: Text, chunks: random.Random | None) -> list[Any]:
    """As the engine: `chunks` splits at random (None: whole), and a cut ends all but audit rollouts. Returns cut and hole."""
    tokens, d = text
    rule.begin(asked)
    cut, start = None, 0
    while start < len(d) and (cut is None or asked.audit):
        end = len(d) if chunks is None else start + chunks.randint(0, 9)
        verdict = rule.observe(asked, tokens[start:end], d[start:end])
        assert cut is None or verdict is None, "a rule speaks once"
        cut, start = cut or verdict, end
    return [cut, rule.end(asked, terminated=cut is not None and not asked.audit)]


def play(rule: StopRule, collective: Any, steps: range, seed: int, chunks: random.Random | None = None) -> list[Any]:
    """Cuts and holes, metrics and state of the rollouts that fall to this rank, step by step."""
    story = []
    for step in steps:
        asked = requests_of(step)
        mine = [a for a in asked if (a.id * 7 + seed) % collective.size == collective.rank]
        verdicts = {a.id: write(rule, a, text_of(a, seed), chunks) for a in mine}
        rule.finish_step(collective, asked[0].id, len(asked))
        story.append((verdicts, dict(rule.metrics()), json.loads(json.dumps(rule.state_dict()))))
    return story


def verdicts_of(
    case: str, seed: int, steps: int = 3
) -> list[tuple[RolloutRequest, Cut | None, tuple[int, int] | None]]:
    story = play(make(case), Solo(), range(steps), seed)
    return [(asked, *story[step][0][asked.id]) for step in range(steps) for asked in requests_of(step)]


@each_rule
def test_the_contract_is_declared(case: str) -> None:
    rule = make(case)
    assert isinstance(rule.needs_divergence, bool)
    assert isinstance(rule.reasons, tuple) and all(isinstance(reason, str) for reason in rule.reasons)
    assert len(set(rule.reasons)) == len(rule.reasons) and not {EOS, LENGTH} & set(rule.reasons)
    assert (rule.reasons == ()) == (case not in CUTTING)


@each_cutting_rule
def test_these_tests_see_cuts(case: str) -> None:
    cuts = [cut for _, cut, _ in verdicts_of(case, seed=0)]
    made = [cut for cut in cuts if cut is not None]
    assert 3 <= len(made) < len(cuts)
    assert {cut.reason for cut in made} == set(make(case).reasons)


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000), split=st.integers(0, 10_000))
def test_chunks_do_not_matter(case: str, seed: int, split: int) -> None:
    whole = play(make(case), Solo(), range(3), seed)
    assert play(make(case), Solo(), range(3), seed, random.Random(split)) == whole


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_cuts_and_holes_lie_within_what_was_written(case: str, seed: int) -> None:
    for asked, cut, hole in verdicts_of(case, seed):
        written = len(text_of(asked, seed)[0])
        assert cut is None or (0 <= cut.kept <= cut.at <= written and cut.reason in make(case).reasons)
        assert hole is None or 0 <= hole[0] < hole[1] <= written


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_the_audit_group_is_judged_like_the_others(case: str, seed: int) -> None:
    """So that the loss is the same with and without it: `kept` and the hole's part of it."""
    judged = []
    for audit in (False, True):
        rule = make(case)
        play(rule, Solo(), range(2), seed)
        asked = [replace(request, audit=audit) for request in requests_of(2)]
        judged.append([write(rule, a, text_of(a, seed), random.Random(seed)) for a in asked])
    assert judged[0] == judged[1]


@each_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_a_resumed_rule_goes_on_bit_for_bit(case: str, seed: int) -> None:
    straight = play(make(case), Solo(), range(STEPS), seed)
    first = make(case)
    play(first, Solo(), range(2), seed)
    resumed = make(case)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert play(resumed, Solo(), range(2, STEPS), seed) == straight[2:]


@each_cutting_rule
@some_seeds
@given(seed=st.integers(0, 10_000))
def test_nothing_after_the_cut_changes_the_rule(case: str, seed: int) -> None:
    """A large chunk brings tokens that would not exist with small ones; even wild ones leave no trace."""

    def story(wild: Sequence[float]) -> list[Any]:
        rule = make(case)
        play(rule, Solo(), range(1), seed)
        told: list[Any] = []
        for asked in requests_of(1):
            rule.begin(asked)
            cut = rule.observe(asked, *text_of(asked, seed))
            if cut is not None and not asked.audit:
                told.append(rule.observe(asked, [7] * len(wild), wild))
            rule.end(asked, terminated=cut is not None and not asked.audit)
        rule.finish_step(Solo(), ROLLOUTS, ROLLOUTS)
        return [told, rule.metrics(), rule.state_dict()]

    quiet, loud = story([]), story([-50.0] * 40)
    assert loud == quiet
    assert all(verdict is None for verdict in loud[0])


@each_rule
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 4))
def test_ranks_agree_with_one_process(case: str, seed: int, size: int) -> None:
    alone = play(make(case), Solo(), range(3), seed)

    def rank_story(rank: LocalRank) -> list[Any]:
        return play(make(case), rank, range(3), seed)

    stories = run_local(size, rank_story)
    for step, (verdicts, metrics, state) in enumerate(alone):
        assert all(story[step][1:] == (metrics, state) for story in stories)
        joined = {id: verdict for story in stories for id, verdict in story[step][0].items()}
        assert joined == verdicts
