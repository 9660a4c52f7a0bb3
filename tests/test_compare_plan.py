"""Comparison files: which runs they mean, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import comparison_file, fake_run
from messages import refused

from katds.cli import dump_recipe
from katds.compare.cells import Run, plan_runs
from katds.compare.plan import filled, load_comparison, nested
from katds.core.behaviours import BEHAVIOURS
from katds.core.objectives import OBJECTIVES
from katds.core.stop import STOP_RULES

ROOT = Path(__file__).parent.parent
KAT = {"kat": {}}


def runs_of(root: Path, cells: dict[str, Any], **more: Any) -> list[Run]:
    return plan_runs(load_comparison(comparison_file(root, cells, **more)))


def test_dotted_and_nested_settings_are_the_same() -> None:
    dotted = {"stop.kind": "prefix", "stop.tokens": 9, "rollout": {"slots": 2}, "rollout.top_k": 3}
    assert nested(dotted) == {"stop": {"kind": "prefix", "tokens": 9}, "rollout": {"slots": 2, "top_k": 3}}


def test_only_named_words_are_filled_in() -> None:
    value = {"a": ["{seed}/{folder}", 3], "pattern": r"\{x\}{seed}{other}"}
    assert filled(value, {"seed": "7", "folder": "f"}) == {"a": ["7/f", 3], "pattern": r"\{x\}7{other}"}


def test_runs_come_seed_by_seed_behind_those_they_need(tmp_path: Path) -> None:
    cells = {"late": {}, "mid": {"after": "kat"}, "kat": {"stop": {"window": 3}}}
    cells["late"] = {"after": "mid", "teacher.path": "{after}/{seed}"}
    runs = runs_of(tmp_path, cells, seeds=[4, 2])
    assert [run.name for run in runs] == [f"{cell}-seed{seed}" for seed in (4, 2) for cell in ("kat", "mid", "late")]
    assert [run.after for run in runs[:3]] == [None, "kat-seed4", "mid-seed4"]
    assert runs[5].recipe.teacher.path == tmp_path / "all" / "mid-seed2" / "2"
    assert (runs[5].seed, runs[5].recipe.run.seed) == (2, 2) and runs[0].recipe.stop.window == 3


def test_objectives_cross_all_cells_and_keep_what_is_compared_apart(tmp_path: Path) -> None:
    cells = {"kat": {}, "next": {"after": "kat", "stop": {"kind": "never"}}}
    objectives = {"a": {"objective.kind": "jsd"}, "b": {}}
    runs = runs_of(tmp_path, cells, objectives=objectives, seeds=[0])
    facts = {run.cell.name: (run.recipe.objective.kind, run.after, run.cell.against) for run in runs}
    assert facts == {
        "kat.a": ("jsd", None, "kat.a"), "next.a": ("jsd", "kat.a-seed0", "kat.a"),
        "kat.b": ("reverse_kl", None, "kat.b"), "next.b": ("reverse_kl", "kat.b-seed0", "kat.b"),
    }  # fmt: skip


def test_an_objective_with_cells_stands_beside_the_others(tmp_path: Path) -> None:
    """Its cells in the file's order, behind those they need, compared among themselves, and not swept."""
    cells = {"kat": {}, "opd": {"stop.kind": "never"}, "next": {"after": "opd"}}
    more = {"sweeps": {"kat": {"stop.window": [6]}}, "seeds": [0], "reference": "kat"}
    beside = {"b": {"objective.kind": "jsd", "cells": ["next", "opd"]}}
    runs = runs_of(tmp_path, cells, objectives=beside, **more)
    facts = {run.cell.name: (run.recipe.objective.kind, run.after, run.cell.against) for run in runs}
    assert facts == {
        "kat": ("reverse_kl", None, "kat"), "kat.window-6": ("reverse_kl", None, "kat"),
        "opd": ("reverse_kl", None, "kat"), "next": ("reverse_kl", "opd-seed0", "kat"),
        "opd.b": ("jsd", None, "opd.b"), "next.b": ("jsd", "opd.b-seed0", "opd.b"),
    }  # fmt: skip
    # With one that crosses all cells, the recipe's own is no more among them.
    both = runs_of(tmp_path, cells, objectives={"a": {"objective.kind": "forward_kl"}} | beside, **more)
    names = [run.cell.name for run in both]
    assert names == ["kat.a", "kat.a.window-6", "opd.a", "opd.b", "next.a", "next.b"]
    assert {run.cell.against for run in both if run.cell.name.endswith(".b")} == {"opd.b"}


def test_settings_hold_for_all_cells_and_a_cell_may_differ(tmp_path: Path) -> None:
    cells = {"kat": {}, "opd": {"stop": {"kind": "never"}, "train.micro_batch_tokens": 50}}
    runs = runs_of(tmp_path, cells, settings={"train.micro_batch_tokens": 40, "train": {"steps": 2}}, seeds=[0])
    assert [(run.recipe.train.steps, run.recipe.train.micro_batch_tokens) for run in runs] == [(2, 40), (2, 50)]


def test_a_sweep_makes_variants_but_not_of_the_cells_own_value(tmp_path: Path) -> None:
    sweep = {"stop.window": [4, 6], "stop.threshold.eta": [0.5], "rollout.chunk_tokens": [3]}
    runs = runs_of(tmp_path, {"kat": {}, "opd": {"stop.kind": "never"}}, sweeps={"kat": sweep}, seeds=[0])
    names = ["kat", "kat.window-6", "kat.eta-0.5", "kat.chunk_tokens-3", "opd"]  # the window of zoo's recipe is 4
    assert [run.cell.name for run in runs] == names
    assert [run.cell.against for run in runs] == ["kat"] * 5
    assert runs[1].recipe.stop.window == 6 and runs[2].recipe.stop.threshold.eta == 0.5
    assert runs[3].cell.swept == ("rollout.chunk_tokens", 3)


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (KAT, {"sedes": [1]}, ["sedes is not a setting", "Did you mean seeds?"]),
    (KAT, {"seeds": [1, 1]}, ["seeds is [1, 1]", "Give each once"]),
    (KAT, {"seeds": []}, ["seeds is []"]),
    (KAT, {"ranks": 0}, ["ranks is 0", ">= 1"]),
    ({}, {}, ["cells is {}"]),
    ({"a/b": {}}, {}, ["'a/b' names a folder", "letters"]),
    (KAT, {"reference": "kta"}, ["reference is 'kta'", "Did you mean kat?"]),
    (KAT, {"sweeps": {"opd": {"stop.window": [3]}}}, ["sweeps is 'opd'", "The cells are kat"]),
    (KAT, {"sweeps": {"kat": {"stop.window": []}}}, ["stop.window has no values"]),
    (KAT, {"sweeps": {"kat": {"stop.window": [6, 6]}}}, ["Two cells are called kat.window-6"]),
    (KAT, {"objectives": {"b": {"cells": ["kta"]}}}, ["objectives.b.cells is 'kta'", "Did you mean kat?"]),
    (KAT, {"objectives": {"b": {"cells": "kat"}}}, ["objectives.b.cells is 'kat'", "Give a list"]),
    (KAT, {"objectives": {"b": {"cells": []}}}, ["objectives.b.cells is []", "Give a list"]),
    (
        {"kat": {}, "next": {"after": "kat"}},
        {"objectives": {"b": {"cells": ["next"]}}},
        ["objectives.b.cells has next, which comes after kat", "Add kat"],
    ),
    ({"kat": {"stop.windw": 3}}, {}, ["cells.kat: stop.windw is not a setting", "stop.window"]),
    ({"kat": {"rollout.slots": 0}}, {}, ["cells.kat: rollout.slots is 0"]),
    ({"kat": {}, "b": {"after": "kta"}}, {}, ["cells.b.after is 'kta'", "Did you mean kat?"]),
    ({"kat": {"after": "b"}, "b": {"after": "kat"}}, {}, ["goes round in a circle: kat -> b -> kat"]),
    ({"kat": {"teacher.path": "{after}"}}, {}, ["cells.kat speaks of {after}", "Say after which cell"]),
    ({"kat": {}, "b": {"train.steps": 3}}, {}, ["Cell b has", "prompts with", "Make them equal"]),
    (
        {"kat": {}, "b": {"rollout.prompts_per_step": 12, "rollout.samples_per_prompt": 1}},
        {},
        ["Cell b has 24 prompts with 1 rollouts each and cell kat 12 prompts with 2"],
    ),
    ({"kat": {"train.steps": None}}, {}, ["train.steps is null in cell kat", "Give a number"]),
    ({"kat": {"evaluation.data": None}}, {}, ["evaluation.data and evaluation.benchmarks are null in cell kat"]),
    ({"kat": {}, "b": {"evaluation.samples": 3}}, {}, ["Section evaluation of cell b differs from that of kat"]),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "more", "pieces"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_explained(tmp_path: Path, cells: Any, more: Any, pieces: list[str]) -> None:
    refused(lambda: runs_of(tmp_path, cells, **more), *pieces)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: x.yaml\ncells: {kat: {}}\n")
    refused(lambda: load_comparison(file), "c.yaml", "folder is missing", "--help")
    refused(lambda: load_comparison(tmp_path / "none.yaml"), "none.yaml", "no such file")


def test_equal_budgets_may_be_cut_into_other_steps(tmp_path: Path) -> None:
    half = {"train.steps": 4, "rollout.prompts_per_step": 3}  # of 2 x 6
    assert len(runs_of(tmp_path, {"kat": {}, "half": half})) == 4


def test_a_cell_that_has_been_run_must_stay_as_it_is(tmp_path: Path) -> None:
    (first, _) = runs_of(tmp_path, KAT)
    fake_run(first.folder, dump_recipe(first.recipe), 0.5, 240)
    assert [run.is_done for run in runs_of(tmp_path, KAT)] == [True, False]
    changed = {"kat": {"stop.window": 3}}
    refused(lambda: runs_of(tmp_path, changed), "stop.window of cell kat is 3", "was run with 4", "remove that folder")
    assert len(runs_of(tmp_path, changed, folder=str(tmp_path / "other"))) == 2
    # The other seed, which has neither finished nor a checkpoint, may change; a resumed run is the same run.
    assert len(runs_of(tmp_path, changed, seeds=[1])) == 1
    resumed = yaml.safe_load(dump_recipe(first.recipe))
    resumed["run"]["resume"] = True
    (first.folder / "config.yaml").write_text(yaml.safe_dump(resumed))
    assert runs_of(tmp_path, KAT)[0].is_done


@pytest.mark.parametrize(
    "file", sorted((ROOT / "launch" / "recipes").glob("compare_*.yaml")), ids=lambda file: file.stem
)
def test_shipped_comparisons_make_recipes(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    comparison = load_comparison(file)
    runs = plan_runs(comparison)
    assert len(runs) % len(comparison.seeds) == 0 and len({run.name for run in runs}) == len(runs)
    assert not any(run.is_done for run in runs)


def test_every_kind_is_among_those_that_train_the_demo() -> None:
    runs = plan_runs(load_comparison(ROOT / "launch" / "recipes" / "compare_demo_kinds.yaml"))
    for section, kinds in (("stop", STOP_RULES), ("objective", OBJECTIVES), ("behaviour", BEHAVIOURS)):
        assert {getattr(run.recipe, section).kind for run in runs} == set(kinds)


def test_one_file_has_the_rules_the_objectives_and_the_sweeps() -> None:
    """rules x objectives x seeds, sweeps over eta, W, T, stride, L0 and chunk size, and the threshold's sources."""
    runs = plan_runs(load_comparison(ROOT / "launch" / "recipes" / "compare_demo.yaml"))
    assert len({run.seed for run in runs}) >= 3
    assert {run.recipe.stop.kind for run in runs} == {"kat", "never", "prefix", "random", "replay"}
    crossed = {(run.recipe.stop.kind, run.recipe.objective.kind) for run in runs}
    assert crossed >= {(r, o) for r in ("kat", "never", "replay") for o in ("reverse_kl", "forward_kl", "jsd")}
    assert {run.cell.swept[0] for run in runs if run.cell.swept} == {
        "stop.threshold.eta", "stop.window", "stop.persistence", "stop.stride", "stop.min_kept", "rollout.chunk_tokens",
    }  # fmt: skip
    kat = [run.recipe.stop for run in runs if run.recipe.stop.kind == "kat"]
    assert {stop.threshold.source for stop in kat} == {"auto", "audit", "all"}
