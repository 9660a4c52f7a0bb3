"""KAT against a naive oracle written from the formulas of METHODS section 1, and its threshold on several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local

from katds.core.collective import Solo
from katds.core.stop.base import RunFacts
from katds.core.stop.kat import KatRule
from katds.core.stop.kat_settings import KatSettings, Source, Supervise
from katds.core.threshold import AdaptiveThreshold
from katds.core.types import Cut, Prompt, RolloutRequest
from katds.core.windows import WindowMeans
from katds.errors import DesyncError
from katds.rollout.requests import in_audit

PROMPT = Prompt(index=0, token_ids=(1,))


def request(id: int = 0, audit: bool = False) -> RolloutRequest:
    return RolloutRequest(id=id, prompt=PROMPT, max_new_tokens=10_000, audit=audit)


def threshold_at(s: float | None) -> AdaptiveThreshold:
    threshold = AdaptiveThreshold(0.3, capacity=4096, min_entries=1, min_steps=0)
    threshold.value = s
    return threshold


def make(
    window: int,
    stride: int,
    persistence: int,
    min_kept: int,
    s: float | None,
    source: Source = "all",
    supervise: Supervise = "before",
) -> KatRule:
    return KatRule(window, stride, persistence, min_kept, threshold_at(s), source, supervise)


def look(rule: KatRule, asked: RolloutRequest, d: Sequence[float]) -> Cut | None:
    return rule.observe(asked, [0] * len(d), d)


def judge(
    rule: KatRule, asked: RolloutRequest, d: Sequence[float], chunk: int = 16
) -> tuple[Cut | None, tuple[int, int] | None]:
    """Cut and hole of one rollout from begin to end, as the engine would write it."""
    rule.begin(asked)
    cut = None
    for start in range(0, len(d), chunk):
        cut = look(rule, asked, d[start : start + chunk]) or cut
        if cut is not None and not asked.audit:
            break
    return cut, rule.end(asked, terminated=cut is not None and not asked.audit)


def play(rule: KatRule, asked: RolloutRequest, d: Sequence[float], chunk: int = 16) -> Cut | None:
    cut, hole = judge(rule, asked, d, chunk)
    assert hole is None
    return cut


def recorded(rule: KatRule, count: int = 1) -> list[float]:
    """The minima that the finished rollouts push, in id order."""
    rule.finish_step(Solo(), 0, count)
    minima: list[float] = rule.state_dict()["minima"]
    return minima


def oracle(
    d: Sequence[float], window: int, stride: int, persistence: int, min_kept: int, s: float, audit: bool
) -> tuple[Cut | None, float | None]:
    """Cut and minimum straight from the definitions, O(T W)."""
    ends = [t for t in range(window, len(d) + 1) if (t - window) % stride == 0]
    z = [float(np.mean(np.array(d[t - window : t]))) for t in ends]
    low = [t - window >= min_kept and mean < s for t, mean in zip(ends, z, strict=True)]
    fired = [k for k in range(persistence - 1, len(ends)) if all(low[k - persistence + 1 : k + 1])]
    cut = Cut(kept=ends[fired[0] - persistence + 1] - window, at=ends[fired[0]], reason="kat") if fired else None
    seen = z if audit or cut is None else z[: fired[0] + 1]
    return cut, min(seen, default=None)


def trap(
    d: Sequence[float], window: int, stride: int, persistence: int, min_kept: int, s: float
) -> tuple[int, int | None, int | None] | None:
    """The first trap's tokens [from, to) straight from the definitions, and after how many tokens its end is seen."""
    ends = [t for t in range(window, len(d) + 1) if (t - window) % stride == 0]
    low = [t - window >= min_kept and float(np.mean(np.array(d[t - window : t]))) < s for t in ends]
    first = next((k for k in range(len(ends)) if all(low[k : k + persistence]) and k + persistence <= len(ends)), None)
    if first is None:
        return None
    over = next((k for k in range(first, len(ends)) if not low[k]), None)
    return ends[first] - window, None if over is None else ends[over - 1], None if over is None else ends[over]


# Eighths have exact sums and, for these windows, both sides divide the same number: ties with s are decided alike.
EIGHTHS = st.integers(0, 24).map(lambda n: n / 8)
NOISE = st.lists(EIGHTHS, max_size=120)
# Stretches of one level with single outliers: traps that begin, are interrupted, and begin again.
STRETCHES = st.lists(st.tuples(EIGHTHS, st.integers(1, 30), st.one_of(st.none(), st.just(200.0))), max_size=8).map(
    lambda parts: [v for level, n, spike in parts for v in [level] * n + ([spike] if spike is not None else [])]
)
SETTINGS = {
    "window": st.integers(1, 12),
    "stride": st.integers(1, 14),
    "persistence": st.integers(1, 5),
    "min_kept": st.integers(0, 40),
    "s": EIGHTHS,
    "audit": st.booleans(),
}


@settings(max_examples=300)
@given(d=st.one_of(NOISE, STRETCHES), chunk=st.integers(1, 40), **SETTINGS)
def test_cut_and_minimum_equal_the_oracle(
    d: list[float], chunk: int, window: int, stride: int, persistence: int, min_kept: int, s: float, audit: bool
) -> None:
    rule = make(window, stride, persistence, min_kept, s)
    cut, minimum = oracle(d, window, stride, persistence, min_kept, s, audit)
    assert play(rule, request(audit=audit), d, chunk) == cut
    assert recorded(rule) == ([] if minimum is None else [minimum])
    assert cut is None or min_kept <= cut.kept < cut.at <= len(d)


@settings(max_examples=300)
@given(d=st.one_of(NOISE, STRETCHES), chunk=st.integers(1, 40), **SETTINGS)
def test_the_ablations_equal_the_oracle(
    d: list[float], chunk: int, window: int, stride: int, persistence: int, min_kept: int, s: float, audit: bool
) -> None:
    """With the trap in the loss, and with all but the trap: cut, hole, and the minimum of what was written."""
    found = trap(d, window, stride, persistence, min_kept, s)
    shape = (window, stride, persistence, min_kept, s, "all")
    start, stop, seen = found or (0, None, None)
    expected = None if stop is None or seen is None else Cut(stop, seen, "kat")

    rule = make(*shape, "agreement")
    assert judge(rule, request(audit=audit), d, chunk) == (expected, None)
    written = d if audit or seen is None else d[:seen]
    means = [float(np.mean(np.array(written[t - window : t]))) for t in range(window, len(written) + 1, stride)]
    assert recorded(rule) == ([min(means)] if means else [])

    rule = make(*shape, "after")
    hole = None if found is None else (start, len(d) if stop is None else stop)
    assert judge(rule, request(audit=audit), d, chunk) == (None, hole)
    means = [float(np.mean(np.array(d[t - window : t]))) for t in range(window, len(d) + 1, stride)]
    assert recorded(rule) == ([min(means)] if means else []), "the queue is that of rollouts that nobody ends"


def test_the_stages_of_a_trap_by_hand() -> None:
    d = [1.0] * 20 + [0.0] * 15 + [1.0] * 15  # windows of 4 are low from token 21 to 35
    for audit in (False, True):
        told = {way: judge(make(4, 1, 4, 0, 0.25, "all", way), request(audit=audit), d) for way in get_args(Supervise)}
        assert told == {
            "before": (Cut(20, 27, "kat"), None),
            "agreement": (Cut(35, 36, "kat"), None),
            "after": (None, (20, 35)),
        }
    assert judge(make(4, 1, 4, 0, 0.25, "all", "after"), request(), d[:30]) == (None, (20, 30))
    assert judge(make(4, 1, 4, 0, 0.25, "all", "agreement"), request(), d[:35]) == (None, None)


def test_only_what_can_end_a_rollout_gives_a_reason() -> None:
    assert {way: make(4, 1, 4, 0, None, "all", way).reasons for way in get_args(Supervise)} == {
        "before": ("kat",), "agreement": ("kat",), "after": (),
    }  # fmt: skip


def test_the_soonest_end_is_checked() -> None:
    """It takes a window more to see the end of a trap than to see its beginning."""
    for way, soonest in (("before", 22), ("agreement", 24)):
        kat = KatSettings(window=8, stride=2, persistence=4, min_kept=8, supervise=way)
        kat.check(soonest + 1, 1.0, 0.1)
        with pytest.raises(ValueError, match=f"stop.kind kat needs {soonest} tokens"):
            kat.check(soonest, 1.0, 0.1)  # a rollout that has come so far ends there by itself
        with pytest.raises(ValueError, match="audit_fraction is 1"):
            kat.check(100, 1.0, 1.0)
    KatSettings(supervise="after").check(4096, 1.0, 1.0)  # ends nothing anyway


@pytest.mark.parametrize("min_kept", range(1, 40))
def test_the_soonest_end_is_the_soonest_end(min_kept: int) -> None:
    """Of a rollout all of whose windows are low, also where `min_kept` is no multiple of the stride."""
    kat = KatSettings(window=16, stride=6, persistence=3, min_kept=min_kept)
    rule = make(16, 6, 3, min_kept, 1.0, "all")
    request = RolloutRequest(1, Prompt(0, (1,)), 500)
    rule.begin(request)
    cut = rule.observe(request, [0] * 200, [0.0] * 200)
    assert cut is not None
    kat.check(cut.at + 1, 1.0, 0.1)
    with pytest.raises(ValueError, match=f"needs {cut.at} tokens"):
        kat.check(cut.at, 1.0, 0.1)


@settings(max_examples=100)
@given(
    d=st.lists(st.floats(0, 20, allow_subnormal=False), min_size=1, max_size=150), quantile=st.floats(0, 1), **SETTINGS
)
def test_real_values_agree_with_the_oracle(
    d: list[float], quantile: float, window: int, stride: int, persistence: int, min_kept: int, s: float, audit: bool
) -> None:
    means = [np.mean(d[t - window : t]) for t in range(window, len(d) + 1)]
    s = float(np.quantile(means, quantile)) + 1e-9 if means else s  # in the middle of what occurs
    assume(all(abs(mean - s) > 1e-12 for mean in means))  # closer than that, the order of additions decides
    rule = make(window, stride, persistence, min_kept, s)
    cut, minimum = oracle(d, window, stride, persistence, min_kept, s, audit)
    assert play(rule, request(audit=audit), d) == cut
    assert recorded(rule) == ([] if minimum is None else [pytest.approx(minimum, rel=1e-13, abs=1e-300)])


@given(
    d=st.lists(st.one_of(st.floats(0, 1e-6), st.floats(1e10, 1e15)), max_size=80),
    window=st.integers(1, 9),
    stride=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 80), max_size=6),
)
def test_window_means_forget_large_values_and_ignore_chunks(
    d: list[float], window: int, stride: int, cuts: list[int]
) -> None:
    whole = list(WindowMeans(window, stride).feed(d))
    streamed = WindowMeans(window, stride)
    borders = [0, *sorted(min(c, len(d)) for c in cuts), len(d)]
    parts = [pair for a, b in pairwise(borders) for pair in streamed.feed(d[a:b])]
    assert parts == whole  # the same bits
    assert [t for t, _ in whole] == list(range(window, len(d) + 1, stride))
    for t, mean in whole:  # 1e15 that has left leaves no residue; a subtracting running sum keeps about 0.1
        assert mean == pytest.approx(math.fsum(d[t - window : t]) / window, rel=1e-14, abs=1e-300)


def test_the_cut_is_the_first_token_of_the_first_low_window_of_the_run_that_fired() -> None:
    d = [1.0] * 10 + [0.0] * 5 + [1.0] * 5 + [0.0] * 20  # low from token 11 (too short), and from token 21
    rule = make(window=4, stride=1, persistence=4, min_kept=0, s=0.25)
    assert play(rule, request(), d) == Cut(20, 27, "kat")


def test_a_trap_from_the_beginning_is_found_after_min_kept() -> None:
    rule = make(window=4, stride=2, persistence=3, min_kept=7, s=0.5)
    assert play(rule, request(), [0.0] * 40) == Cut(8, 16, "kat")


def test_a_window_at_the_threshold_is_not_low() -> None:
    d = [0.5] * 40
    assert play(make(4, 1, 2, 0, 0.5), request(), d) is None
    assert play(make(4, 1, 2, 0, math.nextafter(0.5, 1)), request(), d) == Cut(0, 5, "kat")


def test_nothing_is_cut_before_the_threshold_is_warm() -> None:
    rule = make(4, 1, 1, 0, None)
    assert play(rule, request(), [-1e-9] * 40) is None
    assert recorded(rule) == [pytest.approx(-1e-9)]


def test_the_verdict_comes_once_and_freezes_the_rollout() -> None:
    d = [1.0] * 8 + [0.5] * 8
    for audit, minimum in ((False, 0.5), (True, 0.0)):
        rule, asked = make(4, 1, 2, 0, 0.75), request(audit=audit)
        rule.begin(asked)
        assert look(rule, asked, d) == Cut(7, 12, "kat")
        assert look(rule, asked, [0.0] * 20) is None
        rule.end(asked, terminated=not audit)
        assert recorded(rule) == [minimum]


@pytest.mark.parametrize(
    ("source", "expected"), [("audit", [0.25]), ("completed", [3.0, 0.25]), ("all", [3.0, 0.5, 0.25])]
)
def test_the_source_chooses_whose_minima_enter(source: Source, expected: list[float]) -> None:
    rule = make(4, 1, 1, 0, 0.75, source)
    play(rule, request(0), [3.0] * 9)
    cut = play(rule, request(1), [0.5] * 4 + [0.25] * 8)  # ended at once: 0.5
    play(rule, request(2, audit=True), [2.0] * 4 + [0.5] * 4 + [0.25] * 8)  # the whole rollout: 0.25
    play(rule, request(3, audit=True), [1.0] * 3)  # shorter than a window: undefined
    assert cut == Cut(0, 4, "kat")
    assert recorded(rule, 4) == expected  # in the order of ids
    assert rule.metrics()["kat/min_window"] == pytest.approx(sum(expected) / len(expected))


def test_metrics_leave_out_what_is_undefined() -> None:
    rule = KatRule(4, 1, 1, 0, AdaptiveThreshold(0.3, 8, 2, 1), "all")
    rule.finish_step(Solo(), 0, 0)
    assert rule.metrics() == {"kat/entries": 0.0}
    for id in range(2):
        play(rule, request(id), [float(id)] * 4)
    rule.finish_step(Solo(), 0, 2)
    assert rule.metrics() == {"kat/entries": 2.0, "kat/min_window": 0.5, "kat/threshold": 0.7}


@settings(max_examples=40)
@given(
    minima=st.lists(st.one_of(st.none(), st.floats(1e-3, 5.0)), min_size=1, max_size=24),
    seed=st.integers(0, 2**31),
    source=st.sampled_from(["audit", "completed", "all"]),
)
def test_the_threshold_is_bit_equal_for_any_number_of_ranks(
    minima: list[float | None], seed: int, source: Source
) -> None:
    """Two steps, so that the second is judged by the threshold that came out of the first."""
    generator = np.random.default_rng(seed)
    audits = generator.random(len(minima)) < 0.3
    rollouts = [[m * f for f in generator.random(9)] if m is not None else [1.0] for m in minima]

    def states(collective: LocalRank | Solo, owner: np.ndarray) -> list[dict[str, object]]:
        rule = KatRule(3, 2, 2, 0, AdaptiveThreshold(0.3, 20, 2, 1), source)
        after = []
        for step in range(2):
            first = step * len(rollouts)
            mine = [i for i in range(len(rollouts)) if owner[i] == collective.rank]
            for i in reversed(mine):  # the order of writing must not matter
                play(rule, request(first + i, bool(audits[i])), rollouts[i])
            rule.finish_step(collective, first, len(rollouts))
            after.append({**rule.state_dict(), **rule.metrics()})
        return after

    alone = states(Solo(), np.zeros(len(rollouts), dtype=int))
    for size in (2, 3, 4):
        owner = generator.integers(0, size, len(rollouts))
        assert run_local(size, lambda rank, owner=owner: states(rank, owner)) == [alone] * size


def test_a_rollout_of_two_ranks_is_refused_on_all_ranks() -> None:
    def work(collective: LocalRank) -> str:
        rule = make(2, 1, 1, 0, None)
        play(rule, request(5), [1.0] * 4)
        with pytest.raises(DesyncError, match=r"rollout 5 .* from 2 ranks"):
            rule.finish_step(collective, 4, 3)
        return "refused"

    assert run_local(2, work) == ["refused"] * 2


def test_a_minimum_that_is_not_finite_is_refused() -> None:
    class Corrupting(Solo):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([[math.nan], [0.0]])

    rule = make(2, 1, 1, 0, None)
    with pytest.raises(DesyncError, match="rollout 4"):
        rule.finish_step(Corrupting(), 4, 3)


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, 6, 31])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_divergence_that_is_not_finite_is_an_error(hole: float, position: int, chunk: int) -> None:
    d = [1.0] * 32  # the last two tokens complete no window and no ring
    d[position] = hole
    with pytest.raises(FloatingPointError, match="not finite"):
        play(make(6, 3, 9, 0, 0.5), request(), d, chunk)


def test_open_or_foreign_rollouts_are_noticed() -> None:
    rule = make(2, 1, 1, 0, None)
    rule.begin(request(0))
    with pytest.raises(AssertionError, match="has begun"):
        rule.begin(request(0))
    with pytest.raises(AssertionError, match="not ended"):
        rule.finish_step(Solo(), 0, 1)
    with pytest.raises(AssertionError, match="between steps"):
        rule.state_dict()
    look(rule, request(0), [1.0, 1.0])
    rule.end(request(0), terminated=False)
    with pytest.raises(AssertionError, match="not of this step"):
        rule.finish_step(Solo(), 1, 1)


@settings(max_examples=200)
@given(
    steps=st.integers(1, 12), per_step=st.integers(1, 9), updates=st.integers(1, 4), audit=st.sampled_from([0.0, 0.125, 0.5]),
    entries=st.integers(1, 40), min_steps=st.integers(0, 20), source=st.sampled_from(["auto", "audit", "completed"]),
)  # fmt: skip
def test_a_threshold_that_comes_too_late_is_told(
    steps: int, per_step: int, updates: int, audit: float, entries: int, min_steps: int, source: str
) -> None:
    """There is a warning if and only if no step has a threshold although every rollout has a minimum."""
    assume(source != "audit" or audit > 0)
    queue = {"capacity": 40, "min_entries": entries, "min_steps": min_steps, "source": source}
    section, facts = KatSettings.model_validate({"threshold": queue}), RunFacts(0, steps, per_step, updates, audit)
    rule = KatRule.from_settings(section, facts)
    warm = False
    for step in range(steps):
        warm = warm or "kat/threshold" in rule.metrics()
        for id in range(step * per_step, (step + 1) * per_step):
            judge(rule, request(id, in_audit(id, audit)), [1.0] * 64)
        rule.finish_step(Solo(), step * per_step, per_step)
    assert (section.doubts(facts) == []) == warm


def test_the_source_that_auto_is_is_told() -> None:
    enough, few = RunFacts(0, 1000, 512, 4, 1 / 16), RunFacts(0, 408, 128, 4, 1 / 16)  # 32000 and 3264 audit rollouts
    (audit,), (completed,) = KatSettings().choices(enough), KatSettings().choices(few)
    assert audit == "stop.threshold.source auto is audit in this run: the minima of the audit group"
    assert completed.startswith(
        "stop.threshold.source auto is completed in this run: the minima of rollouts that ended"
    )
    for facts, source in ((enough, "audit"), (few, "completed")):
        assert KatRule.from_settings(KatSettings(), facts)._source == source
    assert KatSettings.model_validate({"threshold": {"source": "all"}}).choices(few) == []


def test_the_warning_names_settings_and_remedy() -> None:
    (doubt,) = KatSettings().doubts(RunFacts(0, 3, 128, 1, 1 / 16))
    assert doubt == (
        "stop.kind kat will end no rollout, as with stop.kind never: stop.threshold.min_steps 50 optimizer steps are not over before the "
        "last of 3 steps x train.minibatches 1 and stop.threshold.min_entries 512 minima are more than the 256 at most before the last "
        "step; lower stop.threshold.min_steps and stop.threshold.min_entries, or train longer"
    )
