"""Evaluations of several benchmarks, of checkpoints, and such as broke off: what a problem scores depends on nothing but the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import refused
from ranks import run_ranks
from safetensors.torch import load_file
from whole_runs import full_run, records, train
from zoo import build_recipe, shared_folder

from katds import evaluate as evaluation
from katds.config import Recipe
from katds.errors import Interrupted, KatdsError
from katds.evaluation.evaluator import Evaluator
from katds.parallel import export
from katds.parallel.export import as_folder, find_model
from katds.signals import listening


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, Any]:
    """Two benchmarks with columns of their own, for the final model of a run."""
    folder, _ = full_run(base, 2)
    made: dict[str, Any] = json.loads((base / "recipe.json").read_text())
    rows = [json.loads(line) for line in (base / "eval.jsonl").read_text().splitlines()]
    # Other problems at the same places: what is known by its place alone would be mistaken for the other's.
    for name, columns, chosen in (
        ("one", ("question", "gold"), rows[:4]),
        ("two", ("problem", "answer"), rows[::-1][:3]),
    ):
        lines = [json.dumps(dict(zip(columns, (row["prompt"], row["answer"]), strict=True))) for row in chosen]
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    made["evaluation"]["data"] = None
    made["evaluation"]["benchmarks"] = {
        "one": {"data": str(tmp_path / "one.jsonl"), "prompt_column": "question", "answer_column": "gold"},
        "two": {"data": str(tmp_path / "two.jsonl"), "prompt_column": "problem", "samples": 5, "k": 3},
    }
    made["student"]["path"] = str(folder / "final")
    made["run"] = {"name": "scores", "folder": str(tmp_path), "seed": 3}
    return made


def evaluate(recipe: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, list[int]]]]:
    """The metrics, and which problems were written for them, phase by phase."""
    asked: list[dict[str, list[int]]] = []
    sample = Evaluator.sample

    def counted(self: Evaluator, chosen: Any) -> Any:
        asked.append({name: list(problems) for name, problems in chosen.items()})
        return sample(self, chosen)

    Evaluator.sample = counted  # type: ignore[method-assign]
    return evaluation.evaluate(Recipe.model_validate(recipe)).metrics(), asked


def evaluated(recipe: dict[str, Any], size: int = 1) -> tuple[dict[str, float], list[dict[str, list[int]]]]:
    first, *others = run_ranks(size, evaluate, recipe)
    assert all(other == first for other in others)
    return first


def results(recipe: dict[str, Any]) -> Path:
    (folder,) = (Path(recipe["run"]["folder"]) / recipe["run"]["name"] / "evaluations").iterdir()
    return folder


def test_benchmarks_together_are_benchmarks_alone_and_their_average(recipe: dict[str, Any]) -> None:
    together, _ = evaluated(recipe, size=2)
    assert {key for key in together if "@" in key and not key.endswith(("_low", "_high"))} == {
        "one/avg@2", "one/pass@2", "two/avg@5", "two/pass@3", "average/avg@k", "average/pass@k",
    }  # fmt: skip
    assert together["average/avg@k"] == pytest.approx((together["one/avg@2"] + together["two/avg@5"]) / 2)
    assert together["average/length_mean"] == pytest.approx(
        (together["one/length_mean"] + together["two/length_mean"]) / 2
    )
    assert 0 < together["average/avg@k_low"] < together["average/avg@k"] < together["average/avg@k_high"] < 1
    found = json.loads((results(recipe) / "results.json").read_text())
    assert found["metrics"] == together and found["benchmarks"]["two"]["problems"] == 3
    assert found["benchmarks"]["two"]["avg@5"] == together["two/avg@5"]

    benchmarks = recipe["evaluation"]["benchmarks"]
    recipe["run"]["name"] = "alone"
    recipe["evaluation"]["benchmarks"] = {"two": benchmarks["two"], "one": None}
    alone, _ = evaluated(recipe)
    assert {key: alone[key] for key in alone if key.startswith("two/")} == {
        key: together[key] for key in together if key.startswith("two/")
    }
    assert not any(key.startswith("one/") for key in alone)

    # Another name is another sample of the same problems.
    recipe["run"]["name"] = "renamed"
    recipe["evaluation"]["benchmarks"] = {"three": benchmarks["two"]}
    renamed, _ = evaluated(recipe)
    assert renamed["three/length_mean"] != together["two/length_mean"]


def test_the_table_has_a_row_per_benchmark(recipe: dict[str, Any]) -> None:
    metrics, _ = evaluated(recipe)
    text = (results(recipe) / "results.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert [row[0] for row in rows] == ["benchmark", "one", "two", "average"]
    assert rows[2][1:4] == ["3", "5", f"{metrics['two/avg@5']:.3f}"] and rows[2][5:7] == [
        "3",
        f"{metrics['two/pass@3']:.3f}",
    ]
    assert rows[3][3] == f"{metrics['average/avg@k']:.3f}" and str(recipe["student"]["path"]) in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1, "columns are aligned"


def test_an_evaluation_that_broke_off_goes_on(recipe: dict[str, Any]) -> None:
    whole, asked = evaluated(recipe)
    assert asked == [{"one": [0, 1, 2, 3]}, {"two": [0, 1, 2]}], "a benchmark at a time"
    again, asked = evaluated(recipe)
    assert again == whole and asked == []

    one, two = sorted(results(recipe).glob("*.jsonl"))
    lines = one.read_text().splitlines()
    one.write_text(
        "\n".join([*lines[:2], lines[3], lines[4][:20]])
    )  # problem 1 is missing, the line of problem 3 is torn
    two.unlink()
    recipe["evaluation"]["portion"] = 1
    resumed, asked = evaluated(recipe, size=2)
    assert asked == [{"one": [1]}, {"one": [3]}, {"two": [0]}, {"two": [1]}, {"two": [2]}]
    assert resumed == whole
    assert evaluated(recipe) == (whole, [])


def asked_to_leave(recipe: dict[str, Any], number: int) -> tuple[int, str, int | None]:
    """The evaluation of which rank 1 gets a signal in the middle of its first portion."""
    sample = Evaluator.sample

    def interrupted(self: Evaluator, chosen: Any) -> Any:
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), number)
        return sample(self, chosen)

    Evaluator.sample = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as left:
        evaluation.evaluate(Recipe.model_validate(recipe))
    assert signal.getsignal(number) == before
    return left.value.exit_code, str(left.value), left.value.reported_by


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_evaluation_that_is_asked_to_leave_keeps_its_portion(recipe: dict[str, Any], number: signal.Signals) -> None:
    whole, asked = evaluated(recipe)
    assert len(asked) == 2
    recipe["run"]["name"] = "asked"
    recipe["rollout"]["slots"] = 1  # two ranks' slots four times over: 4 problems of 2 samples, 2 problems of 5
    for code, said, reporter in run_ranks(2, asked_to_leave, recipe, number):
        assert (code, reporter) == (75, 0) and said.startswith(f"{number.name} came during the evaluation."), said
    (one,) = results(recipe).iterdir()
    assert len(one.read_text().splitlines()) == 1 + 4, "an identity, and the portion"
    again, asked = evaluated(recipe, size=2)
    assert again == whole and asked == [{"two": [0, 1]}, {"two": [2]}]


def asked_before(recipe: dict[str, Any]) -> tuple[int, str]:
    with listening(), pytest.raises(Interrupted) as left:
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluation.evaluate(Recipe.model_validate(recipe))
    return left.value.exit_code, str(left.value)


def test_a_signal_before_the_model_is_loaded_ends_all_ranks(recipe: dict[str, Any]) -> None:
    for code, said in run_ranks(2, asked_before, recipe):
        assert code == 75 and said.startswith("SIGTERM came before anything was scored anew. The same command"), said
    assert not (Path(recipe["run"]["folder"]) / "scores").exists()


def test_hpz_that_does_not_fit_the_ranks_is_everyones_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    """And where it fits, the scores are those of a model without it."""
    zero = json.loads(Path(recipe["student"]["deepspeed"]).read_text())
    zero["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(zero))
    whole, _ = evaluated(recipe)
    recipe["run"]["name"], recipe["student"]["deepspeed"] = "hpz", str(tmp_path / "hpz.json")
    said = set(run_ranks(3, failed, recipe, [tmp_path] * 3))
    assert said == {
        "ConfigError: student.deepspeed: zero_hpz_partition_size is 2, which does not divide the 3 ranks; set it to the ranks of a node."
    }
    assert not (tmp_path / "hpz").exists()
    assert evaluated(recipe, size=2)[0] == whole


def test_what_decides_a_sample_decides_which_are_used_again(recipe: dict[str, Any], base: Path, tmp_path: Path) -> None:
    whole, _ = evaluated(recipe)
    recipe["evaluation"]["k"] = 1  # is no part of a sample
    recipe["evaluation"]["benchmarks"]["two"]["k"] = 1
    recipe["evaluation"]["limit"] = 3
    shorter, asked = evaluated(recipe)
    assert asked == [] and shorter["two/avg@5"] == whole["two/avg@5"] and "one/pass@1" in shorter
    recipe["evaluation"]["temperature"] = 0.5
    _, asked = evaluated(recipe)
    assert asked == [{"one": [0, 1, 2]}, {"two": [0, 1, 2]}]
    recipe["evaluation"]["temperature"] = 3.0
    path = tmp_path / "two.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], rows[1].replace("w", "w1", 1), rows[2]]))
    _, asked = evaluated(recipe)
    assert asked == [{"two": [1]}], "only the problem that has changed"
    copy = tmp_path / "other" / "final"
    shutil.copytree(recipe["student"]["path"], copy, copy_function=shutil.copyfile)
    recipe["student"]["path"] = str(copy)
    _, asked = evaluated(recipe)
    assert len(asked) == 2


@pytest.mark.parametrize("place", ["checkpoints/step-4", "checkpoints", ""])
def test_a_checkpoint_scores_as_the_model_it_ends_as(
    base: Path, recipe: dict[str, Any], place: str, tmp_path: Path
) -> None:
    """Step 4 is the last, so that its checkpoint is what `final` was exported from."""
    run = tmp_path / "run"
    shutil.copytree(full_run(base, 2)[0], run)
    expected, _ = evaluated(recipe)
    recipe["run"]["name"], recipe["student"]["path"] = "from-checkpoint", str(run / place)
    assert evaluated(recipe, size=1 if place else 2)[0] == expected
    written = json.loads((results(recipe) / "results.json").read_text())
    weights = str(run / "checkpoints/step-4/model")
    assert (written["model"], written["weights"]) == (str(run / place), weights)
    assert weights in (results(recipe) / "results.md").read_text(), "a run's folder does not say of which step"
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (run / "checkpoints/step-4/model", run / "final")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in (run / "checkpoints/step-4/model").iterdir()) == sorted(
        p.name for p in (run / "final").iterdir()
    )


def test_a_checkpoint_that_cannot_be_used_is_named(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full_run(base, 2)[0], run)
    config = run / "checkpoints/step-4/config.yaml"
    config.write_text(re.sub(r"(student:\n\s+path: ).*", r"\1/gone/model", config.read_text()))
    refused(lambda: find_model(run), "student.path is", "/gone/model", "bring it back")
    (run / "checkpoints/step-2/student/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(Exception, match=r"step-2 cannot be put together .*another checkpoint"):
        as_folder(find_model(run / "checkpoints/step-2"))
    assert not list((run / "checkpoints/step-2").glob("model*"))


@pytest.mark.parametrize("first", [True, False])
def test_two_evaluations_of_one_checkpoint_may_begin_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """The other one writes the model while this one is about to, or has done so under its partial name."""
    shutil.copytree(full_run(base, 2)[0] / "checkpoints/step-4", tmp_path / "step-4")
    source, write = find_model(tmp_path / "step-4"), export._write

    def interleaved(*given: Any) -> None:
        monkeypatch.setattr(export, "_write", write)
        if first:
            as_folder(source)
        write(*given)
        if not first:
            as_folder(source)

    monkeypatch.setattr(export, "_write", interleaved)
    made = as_folder(source)
    final = load_file(full_run(base, 2)[0] / "final/model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(made / "model.safetensors").items())
    assert not list(made.parent.glob("*.partial"))


def failed(recipe: dict[str, Any], places: Sequence[Path]) -> str:
    os.chdir(places[int(os.environ["RANK"])])
    with pytest.raises(KatdsError) as caught:
        evaluation.evaluate(Recipe.model_validate(recipe))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_weights_that_cannot_be_read_are_a_message(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "cut-off"
    shutil.copytree(recipe["student"]["path"], model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    recipe["student"]["path"] = str(model)
    for said in run_ranks(2, failed, recipe, [tmp_path] * 2):
        assert said.startswith(f"ConfigError: student.path: {model} cannot be loaded with ")


def test_a_node_that_cannot_offload_is_everyones_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Or the ranks of the others would wait for its own."""
    places = [tmp_path / "node-0", tmp_path / "node-1"]
    for place in places:
        place.mkdir()
    (places[1] / "disk").touch()  # where its ranks should make a folder
    offload = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "disk"}}
    (tmp_path / "nvme.json").write_text(json.dumps({"zero_optimization": offload}))
    recipe["student"]["deepspeed"] = str(tmp_path / "nvme.json")
    one, other = run_ranks(2, failed, recipe, places)
    assert one == other and one.startswith("ConfigError: student.deepspeed: offload_param"), (one, other)


def test_ranks_that_read_other_problems_do_not_wait_for_each_other(recipe: dict[str, Any], tmp_path: Path) -> None:
    places = [tmp_path / "node-0", tmp_path / "node-1"]
    rows = (tmp_path / "two.jsonl").read_text().splitlines(keepends=True)
    for place, chosen in zip(places, (rows, rows[:2]), strict=True):
        place.mkdir()
        (place / "two.jsonl").write_text("".join(chosen))
    recipe["evaluation"]["benchmarks"]["two"]["data"] = "two.jsonl"
    for said in run_ranks(2, failed, recipe, places):
        assert said.startswith("DesyncError: problems of two is ")


def test_a_run_evaluates_its_benchmarks_in_one_phase(recipe: dict[str, Any], tmp_path: Path) -> None:
    """And scores them as launch/evaluate.py, one after the other, scores what it has exported. With one problem each they are begun in the
    same round: what belongs to the one must not be taken for the other's."""
    run = build_recipe(tmp_path / "run", "several", train={"steps": 1}, checkpoint={"every": 0})
    run["evaluation"] |= {"data": None, "benchmarks": recipe["evaluation"]["benchmarks"], "limit": 1}
    recipe["evaluation"]["limit"] = 1
    train(2, run)
    folder = tmp_path / "run" / "runs" / "several"
    after = json.loads((folder / "summary.json").read_text())["after"]
    last = [record for record in records(folder) if "eval/average/avg@k" in record][-1]
    assert {f"eval/{key}": value for key, value in after.items()} | {"step": 1} == last
    recipe["student"]["path"] = str(folder / "final")
    recipe["student"]["deepspeed"] = run["student"]["deepspeed"]
    assert evaluated(recipe)[0] == after


MISTAKES = [
    ({"data": "x.jsonl"}, "evaluation.data and evaluation.benchmarks are both given"),
    ({"benchmarks": {"average": {"data": "x"}}}, "evaluation.benchmarks.average has the name of the mean"),
    ({"k": 4}, "evaluation.benchmarks.one: k 4 exceeds samples 2"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES)
def test_settings_that_contradict_each_other(recipe: dict[str, Any], change: dict[str, Any], said: str) -> None:
    recipe["evaluation"] |= change
    with pytest.raises(ValueError, match=re.escape(said)):
        Recipe.model_validate(recipe)


def reading(recipe: dict[str, Any], *parts: str) -> None:
    refused(lambda: evaluation.evaluate(Recipe.model_validate(recipe)), *parts)


def test_columns_of_a_benchmark_are_named_by_it(recipe: dict[str, Any]) -> None:
    recipe["evaluation"]["benchmarks"]["two"]["prompt_column"] = "question"
    run_ranks(1, reading, recipe, "two.jsonl:1", "evaluation.benchmarks.two.prompt_column")
    recipe["evaluation"]["benchmarks"] = None
    run_ranks(1, reading, recipe, "nothing to score")
