"""Behaviour policies other than the student's own in whole runs: they train, and a run that is resumed is the uninterrupted one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import Average
from pydantic import ValidationError
from whole_runs import records, timeless, train, weights
from zoo import build_recipe

from katds.cli import load_recipe
from katds.config import Recipe
from katds.core.behaviours import BEHAVIOURS

STEPS = 4


def recipe_of(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    usual = {
        "teacher": {"gather": "once"}, "evaluation": {"data": None}, "checkpoint": {"every": 2},
        "rollout": {"top_p": 1.0}, "run": {"rollout_samples": 99},
    }  # fmt: skip
    return build_recipe(root, name, **usual | changes)


def resumed(full: Path, name: str, recipe: dict[str, Any], size: int = 2) -> Path:
    """The run once more, from the checkpoint in its middle."""
    folder = full.with_name(name)
    shutil.copytree(full, folder)
    for gone in ("final", "checkpoints/step-4"):
        shutil.rmtree(folder / gone)
    (folder / "summary.json").unlink()
    train(size, recipe | {"run": recipe["run"] | {"name": name, "resume": True}})
    return folder


def assert_same_run(one: Path, two: Path) -> None:
    assert [timeless(r) for r in records(one)] == [timeless(r) for r in records(two)]
    assert (one / "lengths.jsonl").read_bytes() == (two / "lengths.jsonl").read_bytes()
    for file in sorted((two / "rollouts").iterdir()):
        assert (one / "rollouts" / file.name).read_bytes() == file.read_bytes()
    for name, value in weights(two).items():
        assert torch.equal(weights(one)[name], value), name


def samples(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", sorted(BEHAVIOURS.keys() - {"student"}))
def test_a_run_under_each_policy_and_its_resumption(tmp_path: Path, kind: str) -> None:
    """On two ranks, with KAT."""
    recipe = recipe_of(tmp_path, "full", behaviour={"kind": kind})
    train(2, recipe)
    full = tmp_path / "runs" / "full"
    steps = records(full)
    assert [record["step"] for record in steps] == list(range(STEPS))
    assert all(math.isfinite(value) for record in steps for value in record.values())
    assert all(record["train/gradient_norm"] > 0 for record in steps)
    assert any(record["stop/kat"] > 0 for record in steps), "nothing was cut: the test is idle"
    assert_same_run(resumed(full, "again", recipe), full)


def test_a_behaviour_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file and a line: flags, help and the run know it, and what any blend asks of the teacher is asked before a model is loaded."""
    monkeypatch.setitem(BEHAVIOURS, "average", Average)
    with pytest.raises(SystemExit):
        load_recipe(["--help"], "p", "d")
    assert "--behaviour.share" in capsys.readouterr().out

    recipe = recipe_of(tmp_path, "mixed", behaviour={"kind": "average", "share": 0.5}, evaluation={"data": None})
    recipe["train"]["steps"] = 2
    for section, change, message in (
        ("teacher", {"gather": "layer"}, "behaviour.kind average .* set teacher.gather to phase or once"),
        ("rollout", {"overlap": True}, "behaviour.kind average .* set rollout.overlap to false"),
    ):
        with pytest.raises(ValidationError, match=message):
            Recipe.model_validate(recipe | {section: recipe[section] | change})

    train(2, recipe)
    steps = records(tmp_path / "runs" / "mixed")
    assert [record["step"] for record in steps] == [0, 1]
    assert all(math.isfinite(value) for record in steps for value in record.values())
    assert steps[1]["rollout/kl_mean"] < steps[0]["rollout/kl_mean"], "the teacher's share brings the text nearer to it"
