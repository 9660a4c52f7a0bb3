"""Comparisons that really run, on tiny models; what is done again, what fails, and what the report says."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import comparison_file, fake_run, forked
from messages import refused
from transformers import AutoModelForCausalLM
from zoo import build_recipe

from katds.bench import report as bench
from katds.bench.report import processor
from katds.cli import dump_recipe, run_main
from katds.compare.cells import Run, plan_runs
from katds.compare.flops import Batch, Cost, _batches, model_cost, run_flops, training_flops
from katds.compare.outcome import Outcomes, gather
from katds.compare.pictures import draw
from katds.compare.plan import Comparison, load_comparison
from katds.compare.report import report_text, results, verdicts
from katds.compare.running import Maker, _reason, alone, make_runs, makers, record_maker
from katds.config import Recipe
from katds.core.lengths import StepLengths

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "launch" / "compare.py"
WORDS = {"average": "avg@2", "passed": "pass@2"}
CELLS: dict[str, Any] = {"kat": {}, "opd": {"stop.kind": "never"}}


def planned(file: Path) -> tuple[Comparison, list[Run]]:
    comparison = load_comparison(file)
    return comparison, plan_runs(comparison)


def timeless(folder: Path) -> list[dict[str, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "throughput/", "memory/"))} for record in records
    ]


def test_two_cells_with_two_seeds_run_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path)  # or the notes would tell of edits meanwhile
    cells = {"replay": {"after": "kat", "stop": {"kind": "replay", "run": "{after}"}}, "kat": {}}
    _, runs = planned(comparison_file(tmp_path, cells))
    started: list[str] = []
    said: list[str] = []
    assert make_runs(runs, forked(1, started), 1, said.append) == {}
    assert started == ["kat-seed0", "replay-seed0", "kat-seed1", "replay-seed1"]
    assert all(run.is_done for run in runs)
    assert said[0] == "[1/4] kat-seed0: starts" and re.match(r"\[4/4\] replay-seed1: avg@2 0\.\d{3}, pass@2", said[-1])
    first = {run.name: timeless(run.folder) for run in runs}

    # As killed between two steps, as killed before the first checkpoint, and as finished.
    broken, fresh = runs[0].folder, runs[1].folder
    for folder in (broken, fresh):
        (folder / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "step-2")
    shutil.rmtree(fresh / "checkpoints")
    started.clear(), said.clear()
    _, runs = planned(comparison_file(tmp_path, cells))
    assert make_runs(runs, forked(1, started), 1, said.append) == {}
    assert started == ["kat-seed0", "replay-seed0"]
    assert [line for line in said if "goes on" in line or "starts" in line] == [
        "[1/2] kat-seed0: goes on",
        "[2/2] replay-seed0: starts",
    ]
    assert {run.name: timeless(run.folder) for run in runs} == first

    outcomes = gather(runs, {})
    made = [Maker("unknown", 1, processor())]
    assert all(cell.makers == {0: made, 1: made} for cell in outcomes.cells.values())
    lines = [(tmp_path / "all" / "made" / f"{run.name}.jsonl").read_text().count("\n") for run in runs]
    assert lines == [2, 1, 1, 1], "what goes on has a line more, what starts anew has lost its old ones"
    assert all(cell.figures["graded"][0] > 0 for cell in outcomes.cells.values())
    assert list(outcomes.cells) == ["kat", "replay"] and outcomes.notes == [
        "There are fewer than three seeds: intervals are very wide, or missing."
    ]
    for cell in outcomes.cells.values():
        assert all(share > 0 for share in cell.figures["terminated"].values())
    exact = outcomes.cells["kat"].figures["flops"][0]
    (broken / "lengths.jsonl").unlink()
    by_means = gather(runs, {}).cells["kat"].figures["flops"][0]
    assert 0.9 * exact < by_means < exact, "attention costs more where lengths differ"


def test_a_failure_is_told_and_spares_the_others(tmp_path: Path) -> None:
    cells = {
        "bad": {"stop": {"kind": "never"}, "rollout.max_new_tokens": 500},  # more than the models' context
        "next": {"after": "bad"},
        "good": {"stop": {"kind": "prefix", "tokens": 4}},
    }  # fmt: skip
    _, runs = planned(comparison_file(tmp_path, cells, seeds=[0]))
    started: list[str] = []
    said: list[str] = []
    missing = make_runs(runs, forked(1, started), 1, said.append)
    assert started == ["bad-seed0", "good-seed0"]
    assert list(missing) == ["bad-seed0", "next-seed0"]
    assert "ConfigError" in missing["bad-seed0"] and "max_new_tokens 500" in missing["bad-seed0"]
    assert str(tmp_path / "all" / "logs" / "bad-seed0.log") in missing["bad-seed0"]
    assert missing["next-seed0"] == "it needs bad-seed0, which is not done"
    outcomes = gather(runs, missing)
    assert list(outcomes.cells) == ["good"]
    assert [note.partition(" is missing")[0] for note in outcomes.notes[:2]] == ["bad-seed0", "next-seed0"]
    assert gather(runs, {}).notes[0] == "Not run yet: bad-seed0, next-seed0."


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path) -> None:
    _, runs = planned(comparison_file(tmp_path, {"kat": {}}, seeds=[0]))
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "thesis.txt").write_text("mine")
    refused(lambda: make_runs(runs, forked(1, []), 1, lambda line: None), "holds something that is no run")
    assert (runs[0].folder / "thesis.txt").read_text() == "mine"


def test_one_comparison_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path):
        refused(lambda: alone(tmp_path).__enter__(), "another comparison is at work", "Wait for it")
    with alone(tmp_path):
        pass


LOGS = [
    ("a\nerror: x is 3. Lower it.\n[INFO] [launch.py] exits\n", "error: x is 3. Lower it."),
    ("Traceback\n  File\nkatds.errors.TrainingError: bad\n[launch] exits\n", "katds.errors.TrainingError: bad"),
    ("[rank1]: ValueError: no\nbye\n", "[rank1]: ValueError: no"),
    ("Killed\n\n", "Killed"),
    ("", "it said nothing"),
]


@pytest.mark.parametrize(("log", "reason"), LOGS)
def test_the_telling_line_of_a_log(tmp_path: Path, log: str, reason: str) -> None:
    (tmp_path / "log").write_text(log)
    assert _reason(tmp_path / "log") == reason


@pytest.mark.parametrize("kind", ["cross_tokenizer", "policy_gradient"])
def test_no_flops_are_told_of_a_teacher_that_reads_other_tokens(tmp_path: Path, kind: str) -> None:
    recipe = Recipe.model_validate(build_recipe(tmp_path, kind, objective={"kind": kind}, rollout={"top_p": 1.0}))
    if kind == "cross_tokenizer":
        assert run_flops(recipe, tmp_path, {}) is None
    else:
        with pytest.raises(FileNotFoundError):  # it reads what the run has counted
            run_flops(recipe, tmp_path, {})


def test_flops_by_hand() -> None:
    student, teacher = Cost(token=10, pair=2, head=7), Cost(token=100, pair=1, head=9)
    # Prompt 3, written 5, kept 2, learnt from 1 token: 8 tokens and 36 pairs read by both, which have a head at 5; 4 tokens and 10 pairs
    # learnt at 3 times the price, with a head at 1.
    one = (80 + 72 + 35) + (800 + 36 + 45) + 3 * (40 + 20) + 3 * 7
    assert training_flops(student, teacher, [Batch(7, 3, 5, 2, 1)], 1, recomputed=False) == 7 * one
    assert training_flops(student, teacher, [Batch(7, 3, 5, 2, 1)], 1, recomputed=True) == 7 * (one + 60)
    # Three rollouts share the prompt: each reads one of its tokens and two of its six pairs.
    shared = (60 + 2 * 32 + 35) + (600 + 32 + 45) + 180 + 21
    assert training_flops(student, teacher, [Batch(6, 3, 5, 2, 1)], 3, recomputed=False) == pytest.approx(6 * shared)
    assert training_flops(student, teacher, [Batch(1, 3, 5, 0, 0)], 1, recomputed=False) == 187 + 881


def test_rollouts_of_known_length_are_counted_one_by_one() -> None:
    """Two of four are known; the other two have what is left of the step's means."""
    record = {"rollout/length_mean": 10.0, "rollout/kept_mean": 4.0}
    step = StepLengths([4, 8], [4, 2], ["eos", "kat"])
    assert list(_batches(4, 3.0, record, step, 1.5, 0.5)) == [
        Batch(1, 3, 6, 4, 2), Batch(1, 3, 12, 2, 1), Batch(2, 3, 21, 5, 2.5),
    ]  # fmt: skip
    assert list(_batches(2, 3.0, {"rollout/length_mean": 6.0, "rollout/kept_mean": 3.0}, step, 1.0, 1.0))[2:] == []
    assert list(_batches(4, 3.0, record, StepLengths([], [], []), 1.0, 1.0)) == [Batch(4, 3, 10, 4, 4)]


def test_the_cost_of_a_model_is_its_matrices_and_heads(zoo: Path) -> None:
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(zoo / role)
        every = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        head = model.lm_head.weight.numel()
        looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        assert model_cost(zoo / role) == Cost(2 * (every - looked_up - head), 4 * 2 * 4 * 8, 2 * head)


def outcomes_of(root: Path, scores: dict[str, list[float]], **more: Any) -> tuple[Comparison, Outcomes]:
    """Finished runs with these scores; the first cell writes 2,400 tokens and each further one 2,400 more."""
    cells = {name: {"rollout.slots": i} for i, name in enumerate(scores, 1)}
    comparison, runs = planned(comparison_file(root, cells, seeds=[0, 1, 2]))
    for run in runs:
        place = list(scores).index(run.cell.name)
        average = scores[run.cell.name][run.seed]
        fake_run(run.folder, dump_recipe(run.recipe), average, 2400 * (place + 1), **more.get(run.name, {}))
    return comparison, gather(runs, {})


SCORES = {"kat": [0.5, 0.6, 0.7], "worse": [0.4, 0.5, 0.6], "alike": [0.6, 0.6, 0.6], "better": [0.7, 0.79, 0.9]}


def test_the_report_answers_by_paired_differences(tmp_path: Path) -> None:
    comparison, outcomes = outcomes_of(tmp_path, SCORES)
    # worse: always 0.1 less. Its own interval, 0.6 +- 0.25 against 0.5 +- 0.25, would not show it.
    assert list(verdicts(outcomes.cells["kat"], list(outcomes.cells.values())[1:], WORDS)) == [
        "kat against worse: avg@2 +0.100 ± 0.000 with -50.0% rollout tokens: kat is better.",
        "kat against alike: avg@2 +0.000 ± 0.248 with -66.7% rollout tokens: no difference that these seeds can tell from chance.",
        "kat against better: avg@2 -0.197 ± 0.014 with -75.0% rollout tokens: better is better.",
    ]
    text = report_text(comparison, outcomes, WORDS, [Path("x/accuracy.png")])
    table = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("|")}
    assert table["kat - worse"][0].strip() == "+0.100 ± 0.000"
    assert "| kat    | 0.600 ± 0.248 |" in text and "2.400 ± 0.000" in text
    assert "![accuracy](accuracy.png)" in text
    # Thresholds of the fake runs go from 0.4 to 0.2; half of what would have been ended was right.
    drift = next(line for line in text[text.index("## What was ended") :].splitlines() if line.startswith("| kat "))
    assert [cell.strip() for cell in drift.split("|")[2:10]] == [
        "0.4 ± 0", "0.4 ± 0", "0.2 ± 0", "0.50 ± 0.00", "6.000 ± 0.000", "25.0% ± 0.0%", "50.0% ± 0.0%", "4.000 ± 0.000",
    ]  # fmt: skip


def test_results_hold_every_number(tmp_path: Path) -> None:
    comparison, outcomes = outcomes_of(tmp_path, SCORES)
    numbers = json.loads(json.dumps(results(comparison, outcomes)))
    assert numbers["cells"]["better"]["figures"]["average"]["seeds"] == {"0": 0.7, "1": 0.79, "2": 0.9}
    assert numbers["cells"]["kat"]["thresholds"]["2"] == {"0": 0.4, "1": 0.2}
    assert numbers["differences"]["kat - worse"]["tokens"] == {"mean": -2400.0, "half": 0.0, "values": 3}
    assert "kat - kat" not in numbers["differences"] and numbers["commit"] and numbers["machine"]["cores"]


def test_doubts_are_told(tmp_path: Path) -> None:
    odd = {"alike-seed1": {"before": {"avg@2": 0.2}}, "kat-seed2": {"device": "y"}}
    _, outcomes = outcomes_of(tmp_path, SCORES, **odd)
    assert len(outcomes.notes) == 2
    assert "seed 1 differ before training" in outcomes.notes[0] and "made on 1 x x and 1 x y" in outcomes.notes[1]


def test_runs_of_different_code_are_told(tmp_path: Path) -> None:
    """And kept apart in results.json, where a run that was gone on with has all that made it."""
    odd = {"better-seed1": {"commit": "c1"}, "worse-seed2": {"commit": None}}
    comparison, outcomes = outcomes_of(tmp_path, SCORES, **odd)
    differ, unknown = outcomes.notes
    assert differ.startswith("The runs differ in commit (c0: kat-seed0, ") and "; c1: better-seed1)" in differ
    assert unknown == "It is not recorded which commit has made worse-seed2."
    made = json.loads(json.dumps(results(comparison, outcomes)))["cells"]["better"]["made_by"]
    assert made["0"] == [{"commit": "c0", "ranks": 1, "processor": ""}] and made["1"][0]["commit"] == "c1"

    (run,) = (run for run in planned(tmp_path / "comparison.yaml")[1] if run.name == "alike-seed0")
    record_maker(run, Maker("c0", 2, "one"))
    assert makers(run) == [Maker("c0", 1), Maker("c0", 2, "one")]
    _, runs = planned(tmp_path / "comparison.yaml")
    assert [note[:25] for note in gather(runs, {}).notes][1] == "The runs differ in ranks "
    record_maker(run, Maker("c0", 2, "another"))
    assert "differ in processor (one: alike-seed0; another: alike-seed0)" in gather(runs, {}).notes[2]


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, outcomes = outcomes_of(tmp_path, SCORES)
    made = draw(outcomes, "avg@2", tmp_path / "report")
    assert [path.name for path in made] == ["accuracy.png", "thresholds.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """launch/compare.py in this process: exit code, standard output and error."""
    spec = importlib.util.spec_from_file_location("launched_compare", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        with pytest.raises(SystemExit) as left:
            run_main(module.main)
        return int(str(left.value.code)), *capsys.readouterr()

    return call


def test_a_sweep_has_a_table_with_the_cell_itself(tmp_path: Path, compare: Any) -> None:
    file = comparison_file(tmp_path, {"kat": {}}, seeds=[0, 1, 2], sweeps={"kat": {"stop.window": [3, 5]}})
    comparison, runs = planned(file)
    for run in runs:
        fake_run(run.folder, dump_recipe(run.recipe), 0.5 + 0.1 * (run.recipe.stop.window == 5), 2400)
    code, out, _ = compare("--config", str(file), "--report")
    text = (comparison.report_folder / "REPORT.md").read_text()
    assert code == 0 and text in out and f"compare.py --config {file}`" in text
    rows = text[text.index("## stop.window of kat") :].partition("## What")[0].splitlines()
    names = [row.split("|")[1].strip() for row in rows if row.startswith("| kat")]
    assert names == ["kat", "kat.window-3", "kat.window-5"]
    assert "avg@2 minus that of kat" in text
    assert [row.split("|")[-2].strip() for row in rows if row.startswith("| kat")] == [
        "",
        "+0.000 ± 0.000",
        "+0.100 ± 0.000",
    ]
    # All is done: the same command runs nothing, and ends well.
    assert compare("--config", str(file))[0] == 0


def test_the_plan_and_a_choice_of_cells(tmp_path: Path, compare: Any) -> None:
    file = comparison_file(tmp_path, CELLS)
    _, runs = planned(file)
    fake_run(runs[1].folder, dump_recipe(runs[1].recipe), 0.5, 2400)
    code, out, _ = compare("--config", str(file), "--dry-run")
    assert code == 0 and out.splitlines() == [
        "to do  kat-seed0", "done   opd-seed0", "to do  kat-seed1", "to do  opd-seed1", "1 of 4 runs are done",
    ]  # fmt: skip
    assert compare("--config", str(file), "--dry-run", "--cells", "opd")[1].splitlines()[-1] == "1 of 2 runs are done"
    code, _, err = compare("--config", str(file), "--cells", "odp")
    assert code == 2 and err == "error: --cells: odp is no cell of this comparison. Choose among kat, opd.\n"


def test_help_and_errors_of_the_program(tmp_path: Path, compare: Any) -> None:
    code, text, _ = compare("--help")
    assert code == 0
    for piece in ("--dry-run", "{after}", "a comparison file:", *Comparison.model_fields):
        assert piece in text
    code, _, err = compare("--config", str(comparison_file(tmp_path, {"kat": {"stop.windw": 1}})))
    assert code == 2 and "\nerror: cells.kat: stop.windw is not a setting" in "\n" + err.replace("\r", "\n")
    assert not (tmp_path / "all").exists()


def test_a_changed_cell_is_refused_by_the_program(tmp_path: Path, compare: Any) -> None:
    _, (run,) = planned(comparison_file(tmp_path, {"kat": {}}, seeds=[0]))
    fake_run(run.folder, dump_recipe(run.recipe), 0.5, 2400)
    code, _, err = compare("--config", str(comparison_file(tmp_path, {"kat": {"stop.persistence": 3}}, seeds=[0])))
    assert code == 2 and "stop.persistence of cell kat is 3" in err and "was run with 2" in err
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["stop"]["persistence"] == 2


TRAIN = """\
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", {mark!r}])
print("begun", sys.argv[1:], flush=True)
time.sleep(60)
"""
COMPARE = """\
import signal, sys
from pathlib import Path
from katds.compare.running import launcher
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
launcher(Path({train!r}), 1)(Path("recipe"), Path({log!r}))
"""


def test_what_was_started_does_not_outlive_the_comparison(tmp_path: Path) -> None:
    """Neither the run nor what the run has started itself."""
    mark, log, train = f"sleeper-of-{tmp_path}", tmp_path / "log", tmp_path / "train.py"
    train.write_text(TRAIN.format(mark=mark))
    process = subprocess.Popen([sys.executable, "-c", COMPARE.format(train=str(train), log=str(log))], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text() == "begun ['--config', 'recipe']\n" and commands_with(mark)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 5
    assert not commands_with(mark)


def commands_with(text: str) -> list[str]:
    """Processes that name `text` as an argument of their own; not those whose program only holds it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text.encode() in file.read_bytes().split(b"\0"):
                found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_the_whole_program_on_two_ranks(tmp_path: Path) -> None:
    file = comparison_file(tmp_path, {"kat": {}}, seeds=[0], ranks=2)
    done = subprocess.run(
        [sys.executable, "launch/compare.py", "--config", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "[1/1] kat-seed0: avg@2" in done.stdout and "# Comparison" in done.stdout
    assert json.loads((tmp_path / "all" / "kat-seed0" / "summary.json").read_text())["ranks"] == 2
    assert "step 2/2" in (tmp_path / "all" / "logs" / "kat-seed0.log").read_text()
