"""A task reward in a recipe: loaded from the user's module, checked where it is used, and learnt from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from whole_runs import records, train
from zoo import build_recipe

from katds.config import Recipe
from katds.data.grading import make_grader
from katds.data.reward import graded, load_reward
from katds.errors import ConfigError, KatdsError
from katds.sections import MathGraderConfig

MODULE = '''
import math

def words(prompt, response, answer):
    """How many of the response's words have a number below 30."""
    assert prompt and (answer is None or answer in "01")
    found = [int(word[1:]) < 30 for word in response.split() if word[1:].isdigit()]
    return sum(found) / max(1, len(found))

def broken(prompt, response, answer):
    raise RuntimeError("no such thing. Really.")

def nowhere(prompt, response, answer):
    return math.nan

constant = 3
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_callable_of_the_users_is_asked(folder: Path) -> None:
    assert load_reward("my_rewards:words")("p", "w29 w30", None) == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_here:words", "cannot be imported.*No module named 'nothing_here'"),
        ("my_rewards:absent", "cannot be imported.*absent"),
        ("my_rewards:constant", "is no function"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_the_start(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match="reward.function is.*" + message):
        load_reward(name)


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "failed .RuntimeError: no such thing"), ("nowhere", "returned nan")]
)
def test_a_reward_that_is_no_number_ends_the_run(folder: Path, name: str, message: str) -> None:
    with pytest.raises(KatdsError, match=f"my_rewards:{name} {message}.*'response'"):
        load_reward(f"my_rewards:{name}")("prompt", "response", None)


def test_the_grader_rewards_right_answers() -> None:
    pytest.importorskip("math_verify")
    by_value = graded(make_grader(MathGraderConfig()))
    assert (
        by_value("p", r"so it is $\boxed{\frac{1}{2}}$", "0.5") == 1.0 and by_value("p", r"$\boxed{2}$", "0.5") == 0.0
    )
    reward = graded(lambda response, answer: response == answer)
    assert [reward("p", "4", "4"), reward("p", "4", "5"), reward("p", "4", None)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"weight": 1.0}}, "reward.weight is 1, but its gradient is biased"),
        ({"reward": {"weight": 1.0}, "rollout": {"top_p": 1.0}, "data": {"answer_column": None}}, "nothing to grade"),
        ({"reward": {"function": "no colon"}}, "reward.function"),
        (
            {
                "reward": {"weight": 1.0},
                "rollout": {"top_p": 1.0},
                "teacher": {"gather": "once"},
                "behaviour": {"kind": "trb"},
            },
            "behaviour.kind lets another distribution write",
        ),
    ],
)
def test_a_recipe_that_would_be_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = build_recipe(tmp_path, "refused", **changes)
    with pytest.raises(ValidationError, match=re.escape(message)):
        Recipe.model_validate(recipe)


def test_the_student_learns_what_is_rewarded(folder: Path) -> None:
    """On two ranks, several rollouts per prompt, with a loss that pulls towards the teacher at the same time."""
    recipe = build_recipe(
        folder, "rewarded", rollout={"top_p": 1.0, "samples_per_prompt": 4, "prompts_per_step": 8},
        reward={"weight": 100.0, "function": "my_rewards:words"}, stop={"kind": "never"},
        train={"steps": 16, "optimizer": {"lr": 1e-2, "eps": 1e-4}}, evaluation={"data": None},
    )  # fmt: skip
    recipe["stop"] = {"kind": "never"}
    train(2, recipe)
    means = [record["reward/mean"] for record in records(folder / "runs" / "rewarded")]
    assert sum(means[-4:]) > 1.3 * sum(means[:4]), means
