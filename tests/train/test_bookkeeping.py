"""Learning rate, clock, sums over rollouts, console line and summary, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local

from katds.core import lengths
from katds.core.collective import Collective, Solo
from katds.core.lengths import StepLengths
from katds.core.types import EOS, LENGTH, Cut, Prompt, Rollout, RolloutRequest
from katds.errors import TrainingError
from katds.train import statistics
from katds.train.clock import Clock
from katds.train.learner import _finite
from katds.train.memory import peak_memory_bytes
from katds.train.monitor import Monitor
from katds.train.samples import describe
from katds.train.schedule import cosine_with_warmup
from katds.train.step_file import StepFile
from katds.train.summary import summarise, write_summary
from katds.train.timeline import Timeline
from katds.train.writers import Watched, folder_writers


def test_schedule_by_hand() -> None:
    rate = cosine_with_warmup(2.0, 10, 0.2, 0.1)
    assert [rate(0), rate(1), rate(2)] == [1.0, 2.0, 2.0]
    assert rate(6) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way down
    assert rate(10) == rate(25) == pytest.approx(0.2)
    flat = cosine_with_warmup(1.0, 4, 0.0, 1.0)
    assert [flat(step) for step in range(6)] == [1.0] * 6
    assert cosine_with_warmup(1.0, 1, 1.0, 0.0)(0) == 1.0  # nothing but warm-up


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_schedule_rises_then_falls_between_its_ends(steps: int, warmup: float, final: float) -> None:
    rate = cosine_with_warmup(3.0, steps, warmup, final)
    rates = [rate(step) for step in range(steps)]
    top = round(warmup * steps)
    assert rates[: max(1, top)] == sorted(rates[: max(1, top)])
    assert all(one >= two - 1e-12 for one, two in zip(rates[top:], rates[top + 1 :], strict=False))
    assert 0 < max(rates) <= 3.0 and min(rates) >= min(3.0 * final, rates[0]) - 1e-12
    assert rate(steps) == pytest.approx(3.0 * final) or top == steps


def test_clock_names_nested_phases_by_their_path() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("rollout"):
            with clock("decode"):
                time.sleep(0.002)
            with clock("teacher"), clock("decode"):
                pass
    with pytest.raises(RuntimeError), clock("learn"), clock("forward"):
        raise RuntimeError
    seconds = clock.take()
    assert set(seconds) == {
        "rollout",
        "rollout/decode",
        "rollout/teacher",
        "rollout/teacher/decode",
        "learn",
        "learn/forward",
    }
    assert seconds["rollout"] >= seconds["rollout/decode"] >= 0.004
    assert clock.take() == {}
    with clock("learn"):  # an error has not left its phases open
        pass
    assert set(clock.take()) == {"learn"}


def rollout(i: int, length: int, reason: str = LENGTH, audit: bool = False, cut: Cut | None = None) -> Rollout:
    kept = cut.kept if cut else length
    request = RolloutRequest(i, Prompt(i, (5, 6)), 100, audit)
    return Rollout(request, [7] * length, kept, reason, cut, [0.5] * length)


REASONS = ("kat", "loop")
ROLLOUTS = [
    rollout(0, 10, "kat", cut=Cut(4, 10, "kat")),
    rollout(1, 30, "kat", cut=Cut(20, 30, "kat")),
    rollout(2, 20, EOS),
    rollout(3, 100, LENGTH, audit=True, cut=Cut(40, 60, "kat")),  # right; the rule would have saved 40
    rollout(4, 50, EOS, audit=True, cut=Cut(10, 20, "kat")),  # wrong; would have saved 30
    rollout(5, 30, EOS, audit=True),  # right; not cut
]


def correct(of: Rollout) -> bool:
    assert not of.terminated, "a rollout that was ended has no answer to grade"
    return of.id in (3, 5)


def test_sums_by_hand_on_any_ranks() -> None:
    alone = statistics.step_sums(ROLLOUTS, 250, correct, REASONS, Solo())
    assert alone == {
        "rollouts": 6, "tokens": 240, "kept": 4 + 20 + 20 + 40 + 10 + 30, "kl": 120.0, "scored": 240, "decoded": 250,
        "ruled": 3, "ruled_tokens": 60, "audit": 3, "audit_tokens": 180, "audit_cut": 2, "audit_cut_tokens": 70,
        "audit_cut_graded": 2, "audit_cut_correct": 1, "stop/eos": 3, "stop/length": 1, "stop/kat": 2, "stop/loop": 0,
        "prefix": 0,
    }  # fmt: skip
    shared = run_local(
        3, lambda rank: statistics.step_sums(ROLLOUTS[rank.rank :: 3], [250, 0, 0][rank.rank], correct, REASONS, rank)
    )
    assert shared == [alone] * 3


def test_metrics_by_hand() -> None:
    sums = statistics.step_sums(ROLLOUTS, 250, correct, REASONS, Solo())
    assert statistics.step_metrics(sums, graded=True) == pytest.approx({
        "rollout/length_mean": 40.0, "rollout/kept_mean": 124 / 6, "rollout/terminated_fraction": 2 / 6,
        "rollout/saved_fraction": 1 - 20 / 60, "rollout/kl_mean": 0.5, "kat/false_terminations": 0.5,
        "stop/eos": 0.5, "stop/length": 1 / 6, "stop/kat": 2 / 6, "stop/loop": 0.0,
    })  # fmt: skip
    assert statistics.saved_fraction_paired(sums) == pytest.approx(70 / 180)
    assert "kat/false_terminations" not in statistics.step_metrics(sums, graded=False)
    unscored = statistics.step_sums([Rollout(ROLLOUTS[2].request, [7] * 5, 5, EOS)], 5, None, (), Solo())
    assert (
        statistics.step_metrics(unscored, graded=True).keys()
        & {"rollout/kl_mean", "rollout/saved_fraction", "kat/false_terminations"}
        == set()
    )


def test_what_the_teacher_began_is_counted_apart() -> None:
    """Lengths and savings are of what the student wrote."""
    begun = [replace(r, prefix=(5,) * 9) if i % 2 else r for i, r in enumerate(ROLLOUTS)]
    plain, sums = (statistics.step_sums(some, 250, correct, REASONS, Solo()) for some in (ROLLOUTS, begun))
    assert sums == plain | {"prefix": 27}
    metrics = statistics.step_metrics(sums, graded=True)
    assert metrics == statistics.step_metrics(plain, graded=True) | {"rollout/prefix_mean": 4.5}


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def monitor(folder: Path, start: int = 0, steps: int = 20, collective: Collective | None = None) -> Monitor:
    collective, shown = collective or Solo(), partial(describe, decode=decode, correct=correct)
    writers = folder_writers(Watched(folder, "run", start, steps, "a: 1\n", {"a": 1})) if collective.rank == 0 else []
    timeline = Timeline(folder, collective, start)
    return Monitor(timeline, collective, torch.device("cpu"), start, steps, shown, 2, writers)


LEARNED = {
    "loss": 0.25,
    "kl": 0.25,
    "entropy": 1.5,
    "lr": 1e-6,
    "gradient_norm": 0.75,
    "tokens": 124.0,
    "micro_batches": 3.0,
}


def record(of: Monitor, step: int, learned: dict[str, float] = LEARNED, extra: dict[str, float] | None = None) -> None:
    for phase in ("rollout", "learn"):
        with of.phase(phase):
            pass
    sums = statistics.step_sums(ROLLOUTS, 250, correct, REASONS, Solo())
    of.step(step, sums, {**statistics.step_metrics(sums, True), **(extra or {})}, learned, ROLLOUTS)


def test_console_lines_are_aligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = monitor(tmp_path)
    record(of, 0, {"tokens": 0.0, "micro_batches": 0.0})  # nothing was kept: no loss, no rate
    record(of, 9, extra={"kat/threshold": 0.0123})
    of.close()
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    second_cells = re.split(r"  (?=[a-z])", second)
    assert second.startswith(
        "step 10/20  loss  0.2500  kl  0.5000  length   40.0  kept   20.7  cut  33%  saved  67%  threshold 1.23e-02  lr 1.00e-06"
    )
    assert first.startswith("step  1/20  loss       -  kl  0.5000") and "threshold        -  lr        -" in first
    assert [len(cell) for cell in re.split(r"  (?=[a-z])", first)][:8] == [len(cell) for cell in second_cells][:8]


def test_samples_are_as_many_as_asked(tmp_path: Path) -> None:
    of = monitor(tmp_path)
    record(of, 3)
    of.close()
    rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000003.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [3, 4]  # the audit group first: it shows what lies behind the cut
    assert rows[1] == {
        "id": 4, "prompt": "5 6", "response": "7 " * 49 + "7", "pieces": ["7", *[" 7"] * 49], "reason": "eos", "right": False,
        "audit": True, "tokens": 50, "kept": 10, "cut_at": 20, "kl": [0.5] * 50,
    }  # fmt: skip


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def on_rank(rank: LocalRank) -> Monitor:
        of = monitor(tmp_path / str(rank.rank), collective=rank)
        of.begin(0)
        record(of, 0)
        of.evaluation(1, {"avg@2": 0.5})
        of.close()
        return of

    _, other = run_local(2, on_rank)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert capsys.readouterr().out.count("step ") == 1
    assert other.totals["rollouts"] == 6  # but knows the totals, which travel with checkpoints


def test_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 0, "eval/avg@2": 0.1}',
        '{"step": 0, "loss/total": 3}',
        '{"step": 1, "loss/total": 2}',
        '{"step": 2, "eval/avg@2": 0.4}',
    ]
    file.write_text(
        "\n".join([*lines, '{"step": 2, "loss/total": 1}', '{"step": 3, "eval/avg@2": 0.5}', '{"step": 3, "lo'])
    )
    of = monitor(tmp_path, start=2)
    of.close()
    assert file.read_text().splitlines() == lines, "the evaluation after two steps belongs to them"


def test_a_record_that_is_cut_back_is_there_as_a_whole_at_any_moment(tmp_path: Path) -> None:
    """A process that is killed while it resumes must not take along what all before it have recorded."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}, "loss/total": 1}}\n' for step in range(9)))
    with file.open() as before:
        StepFile(file, 3)
        assert len(before.readlines()) == 9, "the old file was not cut, but another put in its place"
    assert len(file.read_text().splitlines()) == 3 and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_record_of_lengths_is_resumed(tmp_path: Path) -> None:
    steps = [StepLengths([n, 9], [n - 1, 9], ["kat", EOS]) for n in range(3, 7)]
    for start, done in ((0, 3), (2, 4)):  # killed in its fourth step, and resumed from two
        of = monitor(tmp_path, start=start)
        for step in range(start, done):
            of.lengths(step, steps[step])
        of.close()
    assert lengths.read(tmp_path) == steps


def test_summary_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = monitor(tmp_path)
    quiet = [rollout(i, 100, LENGTH, audit=i == 6) for i in (6, 7)]
    of.step(0, statistics.step_sums(quiet, 200, correct_none, REASONS, Solo()), {}, LEARNED, quiet)
    record(of, 1, extra={"kat/threshold": 0.25})
    of.clock.take()
    of.seconds = {"rollout": 6.0, "learn": 3.0, "report": 1.0, "evaluation": 50.0, "rollout/decode": 4.0}
    of.close()
    values: dict[str, Any] = {"avg@8": 0.25, "avg@8_low": 0.1, "avg@8_high": 0.4, "length_mean": 30.0}
    summary = summarise(
        of,
        steps=2,
        ranks=2,
        graded=True,
        peak_bytes=3 * 2**20,
        before=values,
        after=values | {"avg@8": 0.5},
        device=torch.device("cpu"),
    )
    expected = {
        "steps": 2, "ranks": 2, "rollouts": 8, "rollout_tokens": 440, "kept_tokens": 324, "learned_tokens": 248, "length_mean": 55.0,
        "saved_fraction": 1 - (160 / 4) / (280 / 4), "saved_fraction_since_first_termination": 1 - 20 / 60,
        "saved_fraction_paired": 70 / 280, "terminated_share": 2 / 8, "terminated_share_since_first_termination": 2 / 6,
        "false_termination_share": 0.5, "audit_rollouts": 4, "audit_cut_graded": 2, "threshold": 0.25, "training_seconds": 10.0,
        "rollout_tokens_per_second": 44.0, "rollout_tokens_per_second_and_rank": 22.0, "peak_memory_bytes": 3 * 2**20,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    out = capsys.readouterr().out
    for text in (
        "2 steps on 2 ranks",
        "0.250 -> 0.500",
        "30 -> 30",
        "440 (248)",
        "42.9%",
        "66.7%",
        "25.0%",
        "50.0%",
        "0.25",
        "22 rollout tokens/s",
        "3 MiB",
    ):
        assert text in out, text
    assert "_low" not in out


def correct_none(of: Rollout) -> bool:
    return False


def test_summary_of_a_run_without_audit_evaluation_or_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = monitor(tmp_path)
    plain = [rollout(0, 8, EOS)]
    with of.phase("rollout"):
        pass
    of.step(0, statistics.step_sums(plain, 8, None, (), Solo()), {}, LEARNED, plain)
    of.close()
    summary = summarise(
        of, steps=1, ranks=1, graded=False, peak_bytes=1, before=None, after=None, device=torch.device("cpu")
    )
    nothing = {key for key, value in summary.items() if value is None}
    assert nothing == {
        "before", "after", "saved_fraction", "saved_fraction_since_first_termination", "saved_fraction_paired",
        "terminated_share_since_first_termination", "false_termination_share", "threshold",
    }  # fmt: skip
    capsys.readouterr()
    write_summary(tmp_path, summary)
    assert "saved" not in capsys.readouterr().out


def test_peak_memory_is_a_number_of_bytes() -> None:
    assert 50 * 2**20 < peak_memory_bytes(Solo(), torch.device("cpu")) < 2**40


def test_not_finite_metrics_do_not_break_the_record(tmp_path: Path) -> None:
    of = monitor(tmp_path)
    record(of, 0, LEARNED | {"gradient_norm": math.nan})
    of.close()
    assert math.isnan(json.loads((tmp_path / "metrics.jsonl").read_text())["train/gradient_norm"])


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_the_run(norm: float) -> None:
    """DeepSpeed would pass over the update without a word."""
    with pytest.raises(TrainingError, match="gradient norm of step 2 is"):
        _finite(norm, 1)
