"""Several teachers in a recipe: a column names each prompt's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from outside import CrossEntropy
from pydantic import ValidationError
from whole_runs import records, train
from zoo import build_model, build_recipe

from katds.config import Recipe
from katds.core.objectives import OBJECTIVES
from katds.errors import ConfigError
from katds.inputs import identity, is_free, read_inputs

NAMES = ["code", None, "math", "code", ""]


def recipe_of(root: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    recipe = build_recipe(root, name, **changes)
    for i, other in enumerate(("code", "math")):
        if not (root / other).exists():
            build_model(root / other, seed=20 + i, hidden=40)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["domain"] = NAMES[i % len(NAMES)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] |= {"teacher_column": "domain"}
    settings = {"deepspeed": str(root / "zero3.json")}
    recipe["teachers"] = {
        "math": settings | {"path": str(root / "math"), "gather": "once"},
        "code": settings | {"path": str(root / "code")},
    }
    return recipe


def test_prompts_go_to_the_teacher_that_they_name(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_of(tmp_path, "routed"))
    inputs = read_inputs(recipe)
    assert list(recipe.every_teacher()) == ["teacher", "teachers.math", "teachers.code"]
    assert [inputs.prompts[i].teacher for i in range(5)] == [2, 0, 1, 2, 0]
    known = identity(recipe, inputs)
    contents = [f"{name}.path (contents)" for name in recipe.every_teacher()]
    assert len({known[name] for name in contents}) == 3 and not any(map(is_free, contents))
    assert is_free("teachers.math.gather") and is_free("teachers.math.path")


def test_a_run_with_three_teachers(tmp_path: Path) -> None:
    """One of them kept whole on each rank, two sharded."""
    recipe = recipe_of(tmp_path, "three", train={"steps": 8, "optimizer": {"lr": 3e-3, "eps": 1e-4}})
    train(2, recipe)
    losses = [record["loss/total"] for record in records(tmp_path / "runs" / "three") if "loss/total" in record]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def spoil(recipe: dict[str, Any], section: str, **change: Any) -> dict[str, Any]:
    return recipe | {section: {key: value for key, value in {**recipe[section], **change}.items() if value is not ...}}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"teacher_column": ...}, "teachers is given, but data.teacher_column is not"),
        ("teachers", {"math": ..., "code": ...}, "data.teacher_column is given, but teachers is not"),
        (
            "data",
            {"teacher_column": "dommain"},
            "no column 'dommain' .data.teacher_column.*Set data.teacher_column=domain",
        ),
        ("teachers", {"math": ...}, "column 'domain' is 'math', which names no teacher. Teachers are code"),
        ("teachers", {"code": {"path": "nowhere"}}, "teachers.code.path is nowhere, which is no folder"),
        ("objective", {"kind": "jsd"}, "needs the head of one teacher, but teachers names math, code"),
        (
            "behaviour",
            {"kind": "trb"},
            "every step beside the student, which needs a single one, but teachers names math, code",
        ),
        ("teachers", {"math": {"path": "x", "gather": "never"}}, "teachers"),
    ],
)
def test_what_does_not_fit_is_said_before_a_model_is_loaded(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    recipe = {"objective": {}, "behaviour": {}, **recipe_of(tmp_path, "refused")}
    recipe = {key: value for key, value in spoil(recipe, section, **change).items() if value != {} or key == "teachers"}
    with pytest.raises((ValidationError, ConfigError), match=message):
        read_inputs(Recipe.model_validate(recipe))


def test_an_objective_from_outside_that_reads_a_head_takes_one_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs tells so, whatever its settings say: the learner has the head of the first teacher only."""
    monkeypatch.setitem(OBJECTIVES, "cross_entropy", CrossEntropy)
    recipe = recipe_of(tmp_path, "heads", objective={"kind": "cross_entropy"})
    with pytest.raises(ValidationError, match="needs the head of one teacher, but teachers names math, code"):
        Recipe.model_validate(recipe)
    del recipe["teachers"], recipe["data"]["teacher_column"]
    Recipe.model_validate(recipe)


def test_a_column_may_be_a_field_of_another(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "nested")
    file = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"extra": {"domain": row.pop("domain")}}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"no column 'domain' .* Set data\.teacher_column=extra\.domain"):
        read_inputs(Recipe.model_validate(recipe))
    recipe["data"]["teacher_column"] = "extra.domain"
    inputs = read_inputs(Recipe.model_validate(recipe))
    assert [inputs.prompts[i].teacher for i in range(5)] == [2, 0, 1, 2, 0]


def test_another_tokenizer_of_a_further_teacher_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tokenizer")
    file = tmp_path / "code" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"teachers\.code\.path is .*whose tokenizer differs"):
        read_inputs(Recipe.model_validate(recipe))
