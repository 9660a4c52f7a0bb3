"""The record of lengths, and the rule that replays it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from local_ranks import run_local
from messages import refused

from katds.core import lengths
from katds.core.collective import Solo
from katds.core.lengths import FILE, StepLengths
from katds.core.stop.base import RunFacts
from katds.core.stop.replay import ReplayRule, ReplaySettings
from katds.core.types import Cut, Prompt, Rollout, RolloutRequest

PROMPT = Prompt(0, (1,))
RECORD = [
    StepLengths([20, 30, 40, 50], [10, 20, 30, 50], ["kat", "kat", "kat", "eos"]),
    StepLengths([25, 60], [15, 60], ["kat", "length"]),
    StepLengths([7] * 5, [3] * 5, ["kat"] * 5),
]


def asked(id: int, max_new_tokens: int = 100) -> RolloutRequest:
    return RolloutRequest(id, PROMPT, max_new_tokens, audit=id % 5 == 0)


def at_step(rule: ReplayRule, step: int) -> ReplayRule:
    rule.load_state_dict({"step": step})
    return rule


def plans(rule: ReplayRule, count: int) -> list[Cut | None]:
    return [rule.plan(asked(id)) for id in range(count)]


def test_cuts_are_drawn_from_the_record_of_the_step() -> None:
    """Chi-square against the recorded distribution; the fixed seed makes it exact in the end: it passes or it does not."""
    rule = ReplayRule(seed=5, steps=3, record=RECORD)
    drawn = Counter(plans(rule, 8000))
    expected = {Cut(10, 20, "replay"), Cut(20, 30, "replay"), Cut(30, 40, "replay"), None}
    assert set(drawn) == expected
    assert sum((n - 2000) ** 2 / 2000 for n in drawn.values()) < 16.3  # 0.1 % of three degrees of freedom
    assert set(plans(at_step(rule, 1), 200)) == {Cut(15, 25, "replay"), None}
    assert set(plans(at_step(rule, 2), 200)) == {Cut(3, 7, "replay")}


def test_rollouts_that_ended_by_themselves_are_not_at_risk() -> None:
    """Of ten rollouts six ended before the first cut; of the four that came to it, two were cut, and of the one that came to the next, one.
    An end at the very token of a cut precedes it."""
    record = [
        StepLengths([10] * 6 + [20, 20, 20, 30], [10] * 6 + [5, 6, 20, 9], ["eos"] * 6 + ["kat", "kat", "eos", "kat"])
    ]
    drawn = Counter(plans(ReplayRule(5, 1, record), 9000))
    assert set(drawn) == {Cut(5, 20, "replay"), Cut(6, 20, "replay"), Cut(9, 30, "replay")}
    assert all(abs(n - 3000) < 200 for n in drawn.values())


def test_as_many_are_cut_as_in_the_record_where_ends_come_as_they_did() -> None:
    """Natural ends and cuts independent of each other: the record's lengths come again, and with them its number of tokens."""
    draw = random.Random(3)

    def lived(cuts: list[Cut | None]) -> StepLengths:
        ends = [draw.randint(1, 100) for _ in cuts]
        over = [cut is not None and cut.at < end for cut, end in zip(cuts, ends, strict=True)]
        lengths = [cut.at if cut and ended else end for cut, end, ended in zip(cuts, ends, over, strict=True)]
        return StepLengths(lengths, lengths, ["kat" if ended else "eos" for ended in over])

    record = lived([Cut(at, at, "kat") if (at := draw.randint(1, 160)) < 90 else None for _ in range(4000)])
    again = lived(plans(ReplayRule(5, 1, [record]), 4000))
    assert sum(again.lengths) == pytest.approx(sum(record.lengths), rel=0.03)
    assert again.reasons.count("kat") == pytest.approx(record.reasons.count("kat"), rel=0.08)


def test_draws_depend_on_seed_and_id_only() -> None:
    record = [StepLengths(list(range(1, 1001)), [0] * 1000, ["kat"] * 1000)]
    first = plans(ReplayRule(0, 1, record), 50)
    assert plans(ReplayRule(0, 1, record), 50) == first
    assert sum(a == b for a, b in zip(first, plans(ReplayRule(1, 1, record), 50), strict=True)) < 5


def test_a_record_of_another_length_is_stretched() -> None:
    def used(steps: int, recorded: int) -> list[int]:
        record = [StepLengths([i + 1], [0], ["kat"]) for i in range(recorded)]
        rule = ReplayRule(0, steps, record)
        cuts = [at_step(rule, step).plan(asked(0)) for step in range(steps)]
        return [cut.at - 1 for cut in cuts if cut is not None]

    assert used(4, 4) == [0, 1, 2, 3]
    assert used(6, 3) == [0, 0, 1, 1, 2, 2]
    assert used(3, 6) == [1, 3, 5]
    assert used(5, 1) == [0] * 5
    assert used(1, 9) == [4]  # the middle of training
    for steps, recorded in ((7, 13), (13, 7), (100, 99)):
        for step, chosen in enumerate(used(steps, recorded)):
            assert abs((chosen + 0.5) / recorded - (step + 0.5) / steps) <= 0.5 / recorded + 1e-9


def test_a_rollout_ends_as_the_one_that_it_drew() -> None:
    rule = ReplayRule(seed=5, steps=3, record=RECORD)
    for id in range(20):
        request, plan = asked(id), rule.plan(asked(id))
        rule.begin(request)
        verdicts = [rule.observe(request, [0] * 5, [0.0] * 5) for _ in range(20)]
        assert rule.end(request, False) is None
        assert [v for v in verdicts if v] == ([plan] if plan else [])
        assert plan is None or verdicts.index(plan) == (plan.at - 1) // 5


ROLLOUTS = [
    (Rollout(asked(10), [7] * 30, 12, "kat", Cut(12, 25, "kat")), 0),  # audit: not recorded
    (Rollout(asked(11), [7] * 9, 4, "kat", Cut(4, 9, "kat")), 1),
    (Rollout(asked(12), [7] * 8, 8, "eos"), 0),
    (Rollout(asked(13), [7] * 6, 5, "loop", Cut(5, 6, "loop")), 1),
    (Rollout(asked(14), [7] * 99, 99, "length"), 0),
]


def test_the_record_is_made_by_all_ranks() -> None:
    requests = [asked(id) for id in range(10, 15)]
    expected = StepLengths([9, 8, 6, 99], [4, 8, 5, 99], ["kat", "eos", "loop", "length"])
    reasons = ("kat", "loop")

    def collected(collective: Any) -> StepLengths:
        mine = [r for r, owner in reversed(ROLLOUTS) if owner % collective.size == collective.rank]
        return lengths.collect(mine, requests, reasons, collective)

    assert collected(Solo()) == expected
    assert run_local(3, collected) == [expected] * 3
    with pytest.raises(AssertionError, match="on one rank"):
        lengths.collect([r for r, _ in ROLLOUTS[1:]], requests, reasons, Solo())


def write(folder: Path, lines: list[str]) -> ReplaySettings:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text("".join(lines))
    return ReplaySettings(run=folder)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    settings = write(tmp_path / "a", [step.line(i) for i, step in enumerate(RECORD)])
    assert lengths.read(tmp_path / "a") == RECORD
    rule = ReplayRule.from_settings(settings, RunFacts(5, 3, 8, 1, 0.2))
    assert plans(rule, 50) == plans(ReplayRule(5, 3, RECORD), 50)
    same = write(tmp_path / "b", [step.line(i) for i, step in enumerate(RECORD)])
    other = write(tmp_path / "c", [step.line(i) for i, step in enumerate(RECORD[::-1])])
    assert settings.contents() == same.contents() != other.contents()


BROKEN = [
    (["{"], "line 1 of"),
    ([RECORD[0].line(0), RECORD[1].line(1)[:-9]], "line 2 of"),  # killed while it wrote
    ([RECORD[0].line(1)], "not the record of step 0"),
    (['{"step": 0, "lengths": [3], "kept": [], "reasons": ["kat"]}\n'], "line 1 of"),
    ([StepLengths([], [], []).line(0)], "rollout.audit_fraction below 1"),
    (["[]\n"], "line 1 of"),
    ([], "holds no step"),
]


@pytest.mark.parametrize(("lines", "piece"), BROKEN)
def test_a_record_that_is_none_is_refused(tmp_path: Path, lines: list[str], piece: str) -> None:
    refused(write(tmp_path / "run", lines).contents, "stop.run", str(tmp_path / "run" / FILE), piece)


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    refused(ReplaySettings(run=tmp_path).contents, "stop.run", FILE, "every run writes it")
