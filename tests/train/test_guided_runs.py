"""Whole runs in which the teacher begins the rollouts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_behaviour_runs import STEPS, recipe_of, samples
from transformers import AutoTokenizer
from whole_runs import rankless, records, train, weights

from katds.cli import load_recipe
from katds.config import Recipe
from katds.core.behaviours.teacher_prefix import TeacherPrefix

PER_STEP, LONGEST = 12, 24
ROOT = Path(__file__).parent.parent.parent
OBJECTIVE = {"kind": "tropd", "guidance": 0.5}


def guided(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    return recipe_of(root, name, **{"behaviour": {"kind": "teacher_prefix"}, **changes})


@pytest.mark.parametrize("gather", ["phase", "once"])
def test_tropd_learns_from_what_the_teacher_began(tmp_path: Path, gather: str) -> None:
    """With KAT, on one, two and four ranks alike."""
    sizes = (2, 1, 4) if gather == "once" else (2,)
    for size in sizes:
        recipe = guided(tmp_path, f"on-{size}", objective=OBJECTIVE, teacher={"gather": gather})
        train(size, recipe)
    folders = [tmp_path / "runs" / f"on-{size}" for size in sizes]
    steps, policy = records(folders[0]), TeacherPrefix("uniform", STEPS)
    prefixes = []
    for step, record in enumerate(steps):
        assert all(math.isfinite(value) for value in record.values())
        assert record["train/gradient_norm"] > 0 and 0 < record["train/trusted"] < 1
        assert record["train/tokens"] == record["rollout/kept_mean"] * PER_STEP, "the teacher's tokens are counted"
        prefixes.append(record.get("rollout/prefix_mean", 0.0))
        assert prefixes[-1] <= policy.longest(LONGEST, step)
    assert prefixes[0] > 6 > prefixes[-1]
    shown = [row for step in range(STEPS) for row in samples(folders[0], step)]
    assert any("prefix" in row for row in shown) and any(row["cut_at"] is not None for row in shown if "prefix" in row)
    for row in shown:
        begun = len(row.get("prefix", "").split())
        assert begun + row["tokens"] <= LONGEST and row["tokens"] == len(row["response"].split()) == len(row["kl"])
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["prefix_tokens"] == pytest.approx(sum(prefixes) * PER_STEP)
    assert summary["rollout_tokens"] == pytest.approx(sum(r["rollout/length_mean"] for r in steps) * PER_STEP)
    assert 0 < summary["seconds"]["rollout/teacher writes"] < summary["seconds"]["rollout"]
    for other in folders[1:]:
        for one, two in zip(steps, records(other), strict=True):
            assert rankless(two) == pytest.approx(rankless(one), rel=1e-4)
        for name, value in weights(folders[0]).items():
            assert (weights(other)[name] - value).abs().max() < 1e-6, name


def test_a_prefix_ends_before_any_end_token_of_the_teacher(tmp_path: Path) -> None:
    """Also one that does not end the student's rollouts: here every third word is one."""
    recipe = guided(tmp_path, "run", objective={"kind": "reverse_kl"}, checkpoint={"every": 0, "export": False})
    recipe["train"]["steps"] = 1
    tokens = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    ends = {word: i for word, i in tokens.get_vocab().items() if i % 3 == 1}
    generation = tmp_path / "teacher" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": sorted(ends.values())}))
    train(1, recipe)
    shown = samples(tmp_path / "runs" / "run", 0)
    prefixes = [row["prefix"].split() for row in shown if "prefix" in row]
    assert sum(map(len, prefixes)) >= 5 and not any(ends.keys() & set(prefix) for prefix in prefixes)
    assert any(ends.keys() & set(row["response"].split()[:-1]) for row in shown), "the student was ended as well"


def test_guidance_pulls_towards_the_teacher_s_tokens(tmp_path: Path) -> None:
    """The weights differ from those of a run that only reads the prefixes, whose rollouts begin alike."""
    for name, guidance in (("guided", 50.0), ("bare", 0.0)):
        train(2, guided(tmp_path, name, objective={"kind": "tropd", "guidance": guidance}, stop={"kind": "never"}) | {
            "stop": {"kind": "never"}})  # fmt: skip
    one, two = (tmp_path / "runs" / name for name in ("guided", "bare"))
    assert samples(one, 0) == samples(two, 0) and samples(one, 3) != samples(two, 3)
    first, second = (records(folder)[0] for folder in (one, two))
    assert first["loss/kl"] == pytest.approx(second["loss/kl"]) and first["loss/total"] > second["loss/total"] + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"kind": "reverse_kl"}},
        {"objective": {"kind": "reopold"}, "train": {"steps": 2, "minibatches": 2}},
        {"objective": {**OBJECTIVE, "outliers": "mask"}, "behaviour": {"kind": "teacher_prefix", "lengths": "longest"}},
        {"objective": {**OBJECTIVE, "outliers": "leave_out", "guidance_over": "student_tokens"}},
    ],
    ids=["reverse_kl", "reopold", "mask", "leave_out"],
)
def test_other_objectives_learn_from_the_student_s_part(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = guided(tmp_path, "run", **changes)
    recipe["train"]["steps"] = 2
    recipe["checkpoint"] = {"every": 0, "export": False}
    train(2, recipe)
    for record in records(tmp_path / "runs" / "run"):
        assert all(math.isfinite(value) for value in record.values())
        assert record["train/gradient_norm"] > 0 and record["loss/entropy"] > 0
        if record["step"] == 0:
            assert record["rollout/prefix_mean"] > 5
        share = record.get("train/learned_share", 1.0)
        assert record["train/tokens"] == pytest.approx(share * record["rollout/kept_mean"] * PER_STEP)


def test_a_reward_is_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its advantage of the student's tokens."""
    (tmp_path / "word_rewards.py").write_text(
        "def words(prompt, response, answer):\n    return len(response.split())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = {"weight": 0.5, "function": "word_rewards:words"}
    recipe = guided(tmp_path, "run", objective=OBJECTIVE, reward=reward, checkpoint={"every": 0, "export": False})
    recipe["stop"] = {"kind": "never"}
    recipe["train"]["steps"] = 2
    train(1, recipe)
    for record in records(tmp_path / "runs" / "run"):
        assert all(math.isfinite(value) for value in record.values())
        shown = samples(tmp_path / "runs" / "run", record["step"])
        texts = [f"{row.get('prefix', '')} {row['response']}".split() for row in shown]
        assert len(texts) == PER_STEP and sum("prefix" in row for row in shown) > PER_STEP / 2
        words = sum(word[1:].isdigit() for text in texts for word in text)
        assert record["reward/mean"] == pytest.approx(words / PER_STEP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"gather": "layer"}}, "behaviour.kind teacher_prefix lets the teacher write.*teacher.gather layer.*phase or once"),
        ({"behaviour": {"kind": "teacher_prefix", "lengths": "short"}}, "lengths"),
        ({"objective": {"kind": "tropd", "guidance": -1.0}}, "guidance"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(guided(tmp_path, "refused", **changes))


def test_several_teachers_cannot_write(tmp_path: Path) -> None:
    recipe = guided(tmp_path, "refused")
    recipe["teachers"] = {"other": recipe["teacher"]}
    recipe["data"] |= {"teacher_column": "domain"}
    with pytest.raises(
        ValidationError, match=re.escape("lets the teacher write, which needs a single one, but teachers names")
    ):
        Recipe.model_validate(recipe)


def test_the_published_tropd_is_a_recipe() -> None:
    recipe = load_recipe(["--config", str(ROOT / "launch/recipes/tropd.yaml")], "launch/train.py", "")
    assert (recipe.objective.kind, recipe.objective.outliers, recipe.objective.guidance) == (
        "tropd",
        "forward_kl",
        0.001,
    )
    assert (recipe.behaviour.kind, recipe.stop.kind, recipe.train.steps) == ("teacher_prefix", "never", 200)
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (128, 4)
