"""The stop rule for loops against a search of the whole text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from katds.core.stop.repetition import Loop, RepetitionRule, RepetitionSettings
from katds.core.types import Cut, Prompt, RolloutRequest

ASKED = RolloutRequest(3, Prompt(0, (1,)), 10_000)


def oracle(text: Sequence[int], max_period: int, repeats: int, min_tokens: int) -> Cut | None:
    """The first t after which the last max(repeats p, min_tokens) tokens have a period p <= max_period, O(T^2 P)."""
    for t in range(1, len(text) + 1):
        for period in range(1, max_period + 1):
            span = max(repeats * period, min_tokens)
            tail = text[t - span : t]
            if t >= span and tail[period:] == tail[:-period]:
                return Cut(t - span + period, t, "repetition")
    return None


def play(rule: RepetitionRule, text: Sequence[int], chunk: int) -> Cut | None:
    rule.begin(ASKED)
    made = None
    for start in range(0, len(text), chunk):
        part = text[start : start + chunk]
        made = rule.observe(ASKED, part, [0.0] * len(part)) or made
    assert rule.end(ASKED, terminated=made is not None) is None
    return made


NOISE = st.lists(st.integers(0, 2), max_size=60)
# Stretches of one phrase, broken off anywhere: loops that nearly close, and loops within loops.
PHRASES = st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 40)), max_size=4).map(
    lambda parts: [phrase[i % len(phrase)] for phrase, n in parts for i in range(n)]
)


@settings(max_examples=400)
@given(
    text=st.one_of(NOISE, PHRASES), chunk=st.integers(1, 40), max_period=st.integers(1, 9), repeats=st.integers(2, 5),
    min_tokens=st.integers(1, 20),
)  # fmt: skip
@example(text=[0, 1] * 3 + [0], chunk=1, max_period=2, repeats=3, min_tokens=7)
def test_the_cut_equals_the_search(text: list[int], chunk: int, max_period: int, repeats: int, min_tokens: int) -> None:
    found = oracle(text, max_period, repeats, min_tokens)
    assert play(RepetitionRule(max_period, repeats, min_tokens), text, chunk) == found


def test_one_copy_is_kept() -> None:
    """What precedes the loop, and the phrase once."""
    before, phrase = [10, 11, 12, 13], [1, 2, 3]
    cut = play(RepetitionRule(max_period=8, repeats=4, min_tokens=1), before + phrase * 9, 5)
    assert cut == Cut(kept=len(before) + 3, at=len(before) + 4 * 3, reason="repetition")


def test_a_short_phrase_needs_more_copies() -> None:
    """Four zeros are a number; thirty-two of them are not."""
    rule = RepetitionRule(max_period=8, repeats=4, min_tokens=32)
    assert play(rule, [5, *[0] * 31, 6], 7) is None
    assert play(rule, [5, *[0] * 40], 7) == Cut(kept=2, at=33, reason="repetition")


def test_a_phrase_that_is_too_long_is_not_seen() -> None:
    phrase = list(range(9))
    assert play(RepetitionRule(max_period=8, repeats=2, min_tokens=1), phrase * 8, 64) is None
    assert play(RepetitionRule(max_period=9, repeats=2, min_tokens=1), phrase * 8, 64) == Cut(9, 18, "repetition")


def test_the_cost_of_a_token_does_not_grow() -> None:
    """The worst text that never closes a loop: two tokens without a pattern, so that each is seen at half of all distances."""

    def seconds(first: int, last: int, loop: Loop) -> float:
        start = time.perf_counter()
        for t in range(first, last):
            loop.closes(t.bit_count() % 2)  # the Thue-Morse sequence has no three copies of anything in a row
        return time.perf_counter() - start

    best = []
    for _ in range(5):
        loop = Loop(max_period=64, repeats=3, min_tokens=1)
        best.append((seconds(0, 2000, loop), seconds(18_000, 20_000, loop)))
    early, late = (min(times) for times in zip(*best, strict=True))
    assert late < 5 * early


def test_a_loop_that_never_fits_is_refused() -> None:
    RepetitionSettings(repeats=4, min_tokens=32).check(33, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stop.min_tokens 32 .* rollout.max_new_tokens 32; lower stop.min_tokens"):
        RepetitionSettings(repeats=4, min_tokens=32).check(32, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"stop.repeats 9 "):
        RepetitionSettings(repeats=9, min_tokens=2).check(9, 1.0, 0.0)
