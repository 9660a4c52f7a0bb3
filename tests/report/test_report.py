"""The page of a run without a browser: its numbers, what it does with runs that lack something, and that it holds no one else's HTML."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hand_made import make_run, sample, score_record, step_record, summary, timeline_record, write
from hypothesis import given
from hypothesis import strategies as st
from messages import refused
from parsing import Page
from whole_runs import full_run
from zoo import shared_folder

from katds.analysis.kl_plot import read_rollouts, thresholds_by_step
from katds.report import phases, stops
from katds.report.accuracy import tokens_before
from katds.report.chart import POINTS, thinned
from katds.report.page import write_page
from katds.report.run import Curve, read_runs, spread
from katds.report.savings import saved_in_words
from katds.report.words import count, duration

ROOT = Path(__file__).parent.parent.parent
HOSTILE = """</script><script>hacked = 1</script><img src=x onerror="hacked = 2"><b>&lt;i&gt;'"{{ 7 * 7 }}\u2028\x00</style><!--"""


def page(folder: Path, *against: Path, steps: tuple[int, ...] = ()) -> Page:
    out = folder.parent / "page.html"
    size = write_page([folder, *against], steps, out)
    assert size == out.stat().st_size
    return Page(out.read_text(encoding="utf-8"))


def drawn(made: Page) -> set[str]:
    return set(made.data["figures"])


ALL = {
    "accuracy", "accuracy-tokens", "saved", "tokens", "mean-lengths", "evaluated-lengths", "stops", "threshold", "false-terminations",
    "loss", "kl", "entropy", "gradient", "lengths", "gantt", "seconds", "throughput", "memory",
}  # fmt: skip


def test_a_whole_run_shows_everything(tmp_path: Path) -> None:
    made = page(make_run(tmp_path / "run"))
    assert drawn(made) == ALL
    for text in (
        "KAT saved 25.6% of the rollout tokens, measured on the audit group. Finished: 4 of 4 steps.",
        "30.0% since the first was ended",
        "avg@4 went from 0.125 to 0.625",
        "0.125 → 0.625",
        "95% interval 0.575 to 0.675",
        "640 of them learnt from",
        "1 h 02 min",
        "25.0% ended by the student, 25.0% at the maximum length, 50.0% ended by kat",
        "The threshold went from 0.01 to 0.04 nats",
        "37.5% of those that KAT would have ended went on to a right answer",
        "Mean rollout: 30 tokens in the first step, 27 in the last",
        "Rollout tokens written so far: 912",
        "Median length 15 tokens in the first step, 15 in the last",
        "33.3% of all are in the topmost row",
        "How ranks spent step 1 (6.0 s), step 3 (6.0 s), step 4 (6.0 s)",
        "20.0 s of training: 60.0% rollout, 30.0% learn, 10.0% report",
        "kat: window 3, persistence 2, threshold.eta 0.3",
        "8 of up to 40 tokens, 25.0% audit group",
    ):
        assert text in " ".join(made.text.split()), text


def test_curves_hold_the_numbers_of_the_records(tmp_path: Path) -> None:
    figures = page(make_run(tmp_path / "run")).data["figures"]
    by_name = {
        f"{chart}: {trace.get('name')}": (trace["x"], trace["y"])
        for chart, made in figures.items()
        for trace in made["data"]
    }
    assert by_name["loss: loss"] == ([1, 2, 3, 4], [1, 1 / 2, 1 / 3, 1 / 4])
    assert by_name["threshold: threshold"] == ([1, 2, 3, 4], pytest.approx([0.01, 0.02, 0.03, 0.04]))
    assert by_name["tokens: run"] == ([1, 2, 3, 4], [240, 472, 696, 912])
    assert by_name["accuracy: avg@4"] == ([0, 4], [0.125, 0.625])
    assert by_name["accuracy-tokens: run"] == ([0, 912], [0.125, 0.625])
    assert by_name["seconds: rollout: decode"][1] == [2.0] * 4
    assert by_name["seconds: rollout: all else"][1] == [0.25] * 4
    arms = figures["accuracy"]["data"][0]["error_y"]
    assert arms["array"] == pytest.approx([0.05, 0.05]) == arms["arrayminus"]
    bars = {trace["name"]: trace for trace in figures["gantt"]["data"]}
    assert (
        bars["learn"]["y"][1] == "step 1, rank 1" and bars["learn"]["base"][1] == 4.0 and bars["learn"]["x"][1] == 1.5
    )
    heat = figures["lengths"]["data"][0]
    shares = [row[0] for row in heat["customdata"]]
    assert shares[-1] == pytest.approx(2 / 6, abs=1e-5) and shares[4] == pytest.approx(
        2 / 6, abs=1e-5
    )  # of 40 and of 5 tokens
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_samples_come_with_what_the_rule_saw(tmp_path: Path) -> None:
    rollouts = page(make_run(tmp_path / "run")).data["rollouts"]
    assert [r["id"] for r in rollouts[:3]] == [1, 2, 0], "audit rollouts first"
    second = next(r for r in rollouts if r["step"] == 2)
    assert second["threshold"] == 0.01, "a step is judged by the threshold of the one before"
    assert rollouts[0]["threshold"] is None
    kl = sample(0)["kl"]
    assert second["window"] == 3 and second["means"] == pytest.approx(
        [sum(kl[i : i + 3]) / 3 for i in range(10)], rel=0.01
    )
    assert second["pieces"][:2] == ["t0 ", "t1 "]


def test_chosen_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    made = page(run, steps=(2, 4))
    assert {r["step"] for r in made.data["rollouts"]} == {2, 4}
    assert {row[:6] for row in made.data["figures"]["gantt"]["data"][0]["y"]} == {"step 2", "step 4"}
    refused(lambda: page(run, steps=(2, 9)), "--steps 9", "1 to 4")


def test_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    kat, opd = make_run(tmp_path / "kat"), make_run(tmp_path / "opd", stop={"kind": "never"})
    made = page(kat, opd)
    for chart in ("accuracy", "accuracy-tokens", "tokens", "throughput", "kl"):
        names = [trace["name"] for trace in made.data["figures"][chart]["data"]]
        assert len(names) == 2 and names[0].startswith("kat") and names[1].startswith("opd"), chart
    assert "kat: 25.0% ended by the student" in made.text
    write(opd / "metrics.jsonl", [step_record(0)])
    assert [trace["name"] for trace in page(kat, opd).data["figures"]["accuracy"]["data"]] == ["kat, avg@4"]
    again = page(kat, make_run(tmp_path / "other" / "kat"))
    assert [t["name"] for t in again.data["figures"]["tokens"]["data"]] == [str(kat), str(tmp_path / "other" / "kat")]


def test_a_run_that_goes_on_or_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "lengths.jsonl", "timeline.jsonl", "rollouts/step-000003.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[: len(text) - 25])
    made = page(run)
    text = " ".join(made.text.split())
    assert "4 of 4 steps so far: the run goes on or was broken off" in text
    assert "KAT saved 25.0% of the rollout tokens" in text, "from the metrics so far"
    assert "avg@4 is 0.125 before training" in text
    assert drawn(made) == ALL
    assert [r["id"] for r in made.data["rollouts"] if r["step"] == 4] == [3001, 3000]


def test_a_finished_run_that_goes_on_with_more_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    (run / "summary.json").write_text(json.dumps(summary(3)))  # train.steps was 3 and is 4 since
    text = " ".join(page(run).text.split())
    assert "4 of 4 steps so far" in text and "Finished:" not in text
    assert "KAT saved 25.0% of the rollout tokens" in text, (
        "from the metrics so far, not from the summary of three steps"
    )


def test_pictures_are_drawn_of_torn_files_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts/step-000003.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "kat/thr')
    assert thresholds_by_step(run) == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03, 3: 0.04})
    assert [row["id"] for row in read_rollouts(run)][-3:] == [3000, 3001, 3002]


def test_half_a_character_at_the_end_of_a_killed_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    file = run / "rollouts" / "step-000003.jsonl"
    file.write_bytes(file.read_bytes() + '{"response": "é'.encode()[:-1])
    assert len(page(run).data["rollouts"]) == 12


def test_numbers_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    records = [step_record(step) for step in range(4)]
    records[1] |= {"loss/total": float("nan"), "loss/kl": float("inf")}
    write(run / "metrics.jsonl", records)
    write(run / "rollouts" / "step-000000.jsonl", [sample(0, kl=[float("nan")] * 12)])
    made = page(run)
    assert made.data["figures"]["loss"]["data"][0]["x"] == [1, 3, 4]
    assert made.data["rollouts"][0]["kl"] == [None] * 12


@pytest.mark.parametrize(
    ("gone", "missing", "said"),
    [
        ("timeline.jsonl", {"gantt"}, "This run has no timeline.jsonl"),
        ("lengths.jsonl", {"lengths"}, "no whole line in lengths.jsonl"),
        ("rollouts", set(), "This run saved no rollouts"),
    ],
)
def test_an_older_run_says_what_is_missing(tmp_path: Path, gone: str, missing: set[str], said: str) -> None:
    run = make_run(tmp_path / "run")
    (shutil.rmtree if (run / gone).is_dir() else Path.unlink)(run / gone)
    made = page(run)
    assert said in made.text and drawn(made) == ALL - missing


def test_metrics_that_a_run_does_not_have(tmp_path: Path) -> None:
    """Plain distillation without evaluations, audit group, tokens and divergences."""
    run = make_run(tmp_path / "run", stop={"kind": "never"}, rollout={"audit_fraction": 0}, evaluation={"data": None})
    absent = ("kat/", "stop/kat", "rollout/saved", "rollout/kl", "memory/")
    rows = [{k: v for k, v in step_record(s).items() if not k.startswith(absent)} for s in range(4)]
    write(run / "metrics.jsonl", [r | {"rollout/prefix_mean": 5.0} for r in rows])
    write(run / "rollouts" / "step-000000.jsonl", [sample(0, kl=[], cut_at=None, pieces=None, prefix="so far")])
    (run / "summary.json").unlink()
    made = page(run)
    assert drawn(made) == ALL - {
        "saved", "threshold", "false-terminations", "accuracy", "accuracy-tokens", "evaluated-lengths", "memory",
    }  # fmt: skip
    assert "Nothing is saved: stop.kind is never" in made.text and "The recipe has no evaluation.data" in made.text
    assert "stop.kind never has no threshold" in made.text
    assert "by the teacher, before" in [trace["name"] for trace in made.data["figures"]["mean-lengths"]["data"]]
    assert made.data["rollouts"][0]["response"] and made.data["rollouts"][0]["prefix"] == "so far"


@pytest.mark.parametrize(
    ("sections", "record", "words"),
    [
        (
            {},
            {"rollout/saved_fraction_total": 0.5},
            "KAT saved 50.0% of the rollout tokens, measured on the audit group",
        ),
        ({"stop": {"kind": "prefix"}}, {"rollout/saved_fraction_total": 0.5}, "The rule prefix saved 50.0%"),
        ({}, {}, "No rollout has been ended yet"),
        ({"rollout": {"audit_fraction": 0}}, {}, "not measured: rollout.audit_fraction is 0"),
        ({"stop": {"kind": "never"}}, {}, "Nothing is saved: stop.kind is never"),
    ],
)
def test_what_is_said_of_savings(tmp_path: Path, sections: Any, record: dict[str, float], words: str) -> None:
    run = make_run(tmp_path / "run", finished=False, **sections)
    write(run / "metrics.jsonl", [{"step": 0, "rollout/length_mean": 3.0, **record}])
    assert words in saved_in_words(read_runs([run])[0])


def test_several_benchmarks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = {
        "math/avg@8": 0.5,
        "math/pass@4": 0.75,
        "average/avg@k": 0.25,
        "average/avg@k_low": 0.2,
        "average/avg@k_high": 0.375,
    }
    write(
        run / "metrics.jsonl", [step_record(0), {"step": 1, **{f"eval/{key}": value for key, value in scores.items()}}]
    )
    made = page(run)
    assert "average/avg@k is 0.250 after 1 steps" in made.text
    names = [trace["name"] for trace in made.data["figures"]["accuracy"]["data"]]
    assert names == ["average/avg@k", "math/avg@8", "math/pass@4"]


def test_no_word_of_a_model_becomes_html(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", run={"name": HOSTILE}, student={"path": HOSTILE}, teacher={"path": HOSTILE})
    rows = [
        sample(0, prompt=HOSTILE, pieces=[HOSTILE] * 12, prefix=HOSTILE, reason=HOSTILE),
        sample(1, pieces=None, response=HOSTILE),
    ]
    write(run / "rollouts" / "step-000000.jsonl", rows)
    write(
        run / "metrics.jsonl", [step_record(0) | {f"stop/{HOSTILE}": 0.5}, score_record(0, 0.5), score_record(1, 0.5)]
    )
    write(run / "timeline.jsonl", [{"step": 0, "ranks": {"0": [[HOSTILE, 0.0, 1.0]]}}])
    made = page(run)
    plain = page(make_run(tmp_path / "plain"))
    tags = [tag for tag, _ in made.elements]
    assert tags.count("script") == 4 and not {"img", "b", "link", "iframe"} & set(tags)
    assert set(tags) <= {tag for tag, _ in plain.elements}
    assert made.data["rollouts"][0]["pieces"] == [HOSTILE] * 12 and made.data["rollouts"][1]["response"] == HOSTILE
    assert HOSTILE.replace("\x00", "") in made.text.replace("\x00", "").replace("\ufffd", ""), "of the recipe, as text"
    for chart in ("stops", "gantt"):  # Plotly reads tags in names
        names = [trace["name"] for trace in made.data["figures"][chart]["data"]]
        assert any("script" in name for name in names) and not any("<" in name for name in names)


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    made = page(make_run(tmp_path / "run"))
    for tag, attributes in made.elements:
        assert not {"src", "srcset", "action", "background", "poster"} & attributes.keys(), (tag, attributes)
        assert attributes.get("href", "#").startswith("#"), (tag, attributes)
    policy = next(a["content"] for tag, a in made.elements if "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "unsafe-inline'; script" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_a_long_run_of_long_rollouts_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollout={"max_new_tokens": 20_000})
    write(run / "metrics.jsonl", map(step_record, range(5000)))
    write(run / "lengths.jsonl", ({"step": s, "lengths": [s + 1] * 8} for s in range(5000)))
    long = sample(0, tokens=6000, kept=3000, cut_at=3500, kl=[0.123456789] * 6000, pieces=["word "] * 6000)
    for step in range(0, 42, 3):
        write(run / "rollouts" / f"step-{step:06d}.jsonl", [long] * 8)
    write(run / "timeline.jsonl", (timeline_record(step, ranks=64) for step in range(20)))
    made = page(run)
    assert (tmp_path / "page.html").stat().st_size < 16e6
    points = [len(trace["x"]) for figure in made.data["figures"].values() for trace in figure["data"]]
    assert max(points) <= POINTS
    assert len(made.data["figures"]["gantt"]["data"][0]["y"]) == 3 * phases.RANKS
    assert "32 of 64 ranks are shown" in made.text
    assert len({r["step"] for r in made.data["rollouts"]}) == 12 and made.data["rollouts"][-1]["step"] == 40
    assert len(made.data["rollouts"][0]["kl"]) == 4000 == len(made.data["rollouts"][0]["means"]) + 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(3, 50))
def test_thinning_loses_no_spike(values: list[float], limit: int) -> None:
    steps = list(range(1, len(values) + 1))
    thin = thinned(Curve(steps, values), limit)
    assert len(thin.steps) <= max(limit, 3) and thin.steps == sorted(set(thin.steps))
    assert {min(values), max(values), values[-1]} <= set(thin.values)
    assert all(values[step - 1] == value for step, value in zip(*thin, strict=True))


def test_averages_over_stretches_keep_the_sum(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "metrics.jsonl", ({"step": s, "stop/eos": s % 7} for s in range(3 * POINTS)))
    curve = stops.averaged(read_runs([run])[0], "stop/eos")
    assert len(curve.values) == POINTS and curve.steps[-1] == 3 * POINTS
    assert 3 * sum(curve.values) == pytest.approx(sum(s % 7 for s in range(3 * POINTS)))


def test_spread_and_words() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2] and spread(range(5), 1) == [4]
    assert [count(v) for v in (5, 912, 783_094, 1_484_000, 999_960, 0.245)] == [
        "5",
        "912",
        "783 k",
        "1.48 M",
        "1.00 M",
        "0.24",
    ]
    assert [duration(v) for v in (38.5, 229.2, 3599.7, 7500, 273_600)] == [
        "38.5 s",
        "3 min 49 s",
        "1 h 00 min",
        "2 h 05 min",
        "3 d 04 h",
    ]


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    refused(lambda: page(tmp_path / "none"), "none is no run folder", "config.yaml")
    begun = make_run(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    refused(lambda: page(begun), "no finished step")
    refused(lambda: page(make_run(tmp_path / "run"), tmp_path), "is no run folder")
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused(lambda: write_page([tmp_path / "run"], [], blocked / "page.html"), "--out", "cannot be written")


def test_the_program(tmp_path: Path) -> None:
    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/report.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    run = make_run(tmp_path / "run")
    done = start(run)
    assert done.returncode == 0, done.stderr
    assert f"{run / 'report.html'}: " in done.stdout
    assert drawn(Page((run / "report.html").read_text())) == ALL
    wrong = start(tmp_path)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and wrong.stderr.startswith("error: ")


def test_a_run_as_the_trainer_writes_it(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Every chart finds its numbers in a real run's folder, and they are those of its summary."""
    folder, _ = full_run(shared_folder(tmp_path_factory), 2)
    out = tmp_path / "page.html"
    write_page([folder], [], out)
    made, said = Page(out.read_text()), json.loads((folder / "summary.json").read_text())
    assert drawn(made) >= ALL - {"false-terminations", "saved"}, ALL - drawn(made)
    run = read_runs([folder])[0]
    assert run.cumulative_tokens().values[-1] == pytest.approx(said["rollout_tokens"])
    assert tokens_before(run, 0) == 0 and tokens_before(run, 99) == pytest.approx(said["rollout_tokens"])
    assert (
        run.scores("avg@2").values[0] == said["before"]["avg@2"]
        and run.scores("avg@2").values[-1] == said["after"]["avg@2"]
    )
    ended = sum(trace["y"][-1] for trace in made.data["figures"]["stops"]["data"])
    assert ended == pytest.approx(1)
    rollouts = made.data["rollouts"]
    assert {r["step"] for r in rollouts} == {1, 2, 3, 4} and all(len(r["pieces"]) == r["tokens"] for r in rollouts)
    assert {row.rpartition(" ")[2] for row in made.data["figures"]["gantt"]["data"][0]["y"]} == {"0", "1"}
