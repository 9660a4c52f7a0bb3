"""Whole runs with a teacher of another tokenizer, and what is said about pairs that do not fit."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from messages import refused
from pydantic import ValidationError
from tokenizer_zoo import tokenizer
from whole_runs import records, timeless, train, weights
from zoo import build_recipe, random_model

from katds.config import Recipe
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.cross_tokenizer import CrossTokenizer, CrossTokenizerSettings
from katds.inputs import identity, is_free, read_inputs

TEXTS = ("3 * 4 < 2 :", "漢字 🙂 ?", "naïve e\u0301", "17 * 33 < 3 :", "x", "Ελλάδα и 한국어")


def folder(path: Path, kind: str, seed: int, **options: Any) -> Path:
    random_model(seed, vocabulary=len(tokenizer(kind)) + 3, **options).save_pretrained(path)
    tokenizer(kind).save_pretrained(path)
    # The tokenizer's word, not the zoo's, which has another one.
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text()) | {
            "eos_token_id": tokenizer(kind).eos_token_id,
            "pad_token_id": None,
        }
        (path / name).write_text(json.dumps(content))
    return path


def recipe_of(
    root: Path, name: str, student: str = "byte_level", teacher: str = "unigram", **changes: Any
) -> dict[str, Any]:
    recipe = build_recipe(
        root,
        name,
        objective={"kind": "cross_tokenizer"},
        evaluation={"data": None},
        **{"checkpoint": {"every": 2}, **changes},
    )
    for role, kind, options in (("student", student, {"tied": True}), ("teacher", teacher, {"hidden": 48})):
        path = root / f"{role}-{kind}"
        if not path.exists():
            folder(path, kind, 1 + (role == "teacher"), **options)
        recipe[role] |= {"path": str(path)}
    rows = [json.dumps({"prompt": TEXTS[i % len(TEXTS)] + f" {i}", "answer": str(i % 2)}) for i in range(24)]
    (root / "texts.jsonl").write_text("".join(row + "\n" for row in rows))
    recipe["data"] |= {"train": str(root / "texts.jsonl"), "max_prompt_tokens": 64}
    recipe["rollout"] |= {"top_p": 1.0, "temperature": 1.0}
    return recipe


def test_a_run_is_the_same_on_any_ranks_and_resumed(tmp_path: Path) -> None:
    """KAT cuts, two updates a step; on one rank and on two, and broken off and gone on with."""
    changes = {"train": {"minibatches": 2}}
    seen = {}
    for size in (1, 2):
        seen[size] = train(size, recipe_of(tmp_path, f"ranks-{size}", **changes))
    for step in range(4):
        assert rollouts(seen[1], step) == rollouts(seen[2], step)
    assert any(reason == "kat" for _, _, reason in rollouts(seen[1], 3).values()), "nothing was cut: the test is idle"
    steps = [r for r in records(tmp_path / "runs" / "ranks-2") if "loss/total" in r]
    assert len(steps) == 4
    for record in steps:
        assert all(map(math.isfinite, record.values())) and record["train/gradient_norm"] > 0
        share = record["train/tokens"] / (record["rollout/kept_mean"] * 12)
        assert 0.1 < share <= 1 and record["train/learned_share"] == pytest.approx(share)
    # In some step, not in each: short rollouts may all be sayable, and what is sampled differs between processors.
    assert any(record["train/learned_share"] < 1 for record in steps), "the teacher can say all: the test is idle"

    resumed = recipe_of(tmp_path, "resumed", **changes)
    shutil.copytree(tmp_path / "runs" / "ranks-2", tmp_path / "runs" / "resumed")
    shutil.rmtree(tmp_path / "runs" / "resumed" / "checkpoints" / "step-4")
    shutil.rmtree(tmp_path / "runs" / "resumed" / "final")
    resumed["run"] |= {"resume": True}
    train(2, resumed)
    one, two = (tmp_path / "runs" / name for name in ("ranks-2", "resumed"))
    assert [timeless(record) for record in records(two)] == [timeless(record) for record in records(one)]
    for name, value in weights(one).items():
        assert torch.equal(weights(two)[name], value), name


def rollouts(ranks: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """id -> tokens, kept, reason, over all ranks."""
    return {id: row for rank in ranks for id, row in rank[str(step)]["rollouts"].items()}


def test_a_resumed_run_keeps_the_tokenizer_of_its_teacher(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_of(tmp_path, "known"))
    known = identity(recipe, read_inputs(recipe))
    file = recipe.teacher.path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"][-1][1] -= 1.0  # one byte is less likely: other tokens, of the same names
    file.write_text(json.dumps(content))
    other = identity(recipe, read_inputs(recipe))
    assert known["teacher.path (tokenizer)"] != other["teacher.path (tokenizer)"]
    assert not is_free("teacher.path (tokenizer)")


def test_each_model_is_prompted_in_its_own_tokens_by_its_own_template(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "prompted")
    settings = json.loads((tmp_path / "teacher-unigram" / "tokenizer_config.json").read_text())
    template = tmp_path / "teacher-unigram" / "chat_template.jinja"
    assert template.exists() or settings.get("chat_template")
    template.write_text("{% for m in messages %}Q: {{ m['content'] }}{% endfor %} A:")
    inputs = read_inputs(Recipe.model_validate(recipe))
    for i, text in enumerate(TEXTS):
        prompt = inputs.prompts[i]
        assert tokenizer("byte_level").decode(prompt.token_ids) == f"[user] {text} {i} [assistant]"
        assert tokenizer("unigram").decode(prompt.teacher_ids) == f"Q: {text} {i} A:"
    recipe["data"] |= {"chat_template": False}
    prompt = read_inputs(Recipe.model_validate(recipe)).prompts[1]
    assert (
        tokenizer("unigram").decode(prompt.teacher_ids)
        == tokenizer("byte_level").decode(prompt.token_ids)
        == f"{TEXTS[1]} 1"
    )
    # A student without a template, and a teacher with one.
    recipe["data"] |= {"chat_template": "teacher"}
    (tmp_path / "student-byte_level" / "chat_template.jinja").unlink()
    prompt = read_inputs(Recipe.model_validate(recipe)).prompts[1]
    assert tokenizer("unigram").decode(prompt.teacher_ids) == f"Q: {TEXTS[1]} 1 A:"
    assert tokenizer("byte_level").decode(prompt.token_ids) == f"{TEXTS[1]} 1"
    assert (
        inputs.teacher_vocabulary
        == len(tokenizer("unigram"))
        != inputs.facts.tokenizer_size
        == len(tokenizer("byte_level"))
    )


def test_a_reward_is_of_all_tokens_also_of_those_that_the_teacher_cannot_say(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "rewarded", reward={"weight": 0.5}, checkpoint={"every": 0, "export": False})
    train(1, recipe)
    steps = [r for r in records(tmp_path / "runs" / "rewarded") if "loss/total" in r]
    assert any(record["train/learned_share"] < 1 for record in steps), "the teacher can say all: the test is idle"
    for record in steps:
        assert record["train/tokens"] == pytest.approx(record["rollout/kept_mean"] * 12)


def test_the_teacher_may_end_with_any_of_its_end_tokens(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "ends")
    end = tokenizer("unigram").eos_token_id
    known = read_inputs(Recipe.model_validate(recipe)).bridge
    assert known is not None and known.end_ids == (end,)
    file = tmp_path / "teacher-unigram" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [9, end]}))
    bridge = read_inputs(Recipe.model_validate(recipe)).bridge
    assert bridge is not None and bridge.end_ids == (end, 9) and bridge.digest != known.digest


def test_other_objectives_ask_for_this_one_by_name(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "refused") | {"objective": {"kind": "reverse_kl"}}
    refused(
        lambda: read_inputs(Recipe.model_validate(recipe)), "teacher.path", "or give objective.kind: cross_tokenizer"
    )


def test_of_several_teachers_none_may_have_another_tokenizer(tmp_path: Path) -> None:
    """And what has one teacher only is no remedy."""
    recipe = recipe_of(tmp_path, "several") | {"objective": {"kind": "reverse_kl"}}
    recipe |= {
        "teachers": {"math": recipe["teacher"]},
        "teacher": recipe["teacher"] | {"path": recipe["student"]["path"]},
    }
    recipe["data"] |= {"teacher_column": "domain"}
    said = refused(
        lambda: read_inputs(Recipe.model_validate(recipe)), "teachers.math.path", "all models from one family"
    )
    assert "or give" not in said


def test_one_template_for_one_of_two_needs_two_tokenizers(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "refused") | {"objective": {"kind": "reverse_kl"}}
    recipe["data"] |= {"chat_template": "teacher"}
    with pytest.raises(ValidationError, match=r"chat_template is teacher.*kind reverse_kl .*true or false"):
        Recipe.model_validate(recipe)
    recipe |= {"objective": {"kind": "cross_tokenizer"}}
    (tmp_path / "teacher-unigram" / "chat_template.jinja").unlink()
    said = "asks for the teacher's chat template, but its tokenizer has none"
    refused(lambda: read_inputs(Recipe.model_validate(recipe)), said, "data.chat_template=false")
    recipe["data"] |= {"chat_template": True}
    (tmp_path / "student-byte_level" / "chat_template.jinja").unlink()
    refused(lambda: read_inputs(Recipe.model_validate(recipe)), "student's chat template", "or set it to teacher")


def test_one_tokenizer_for_both_is_allowed_and_said(tmp_path: Path) -> None:
    inputs = read_inputs(Recipe.model_validate(recipe_of(tmp_path, "same", teacher="byte_level")))
    (warning,) = inputs.facts.warnings
    assert "share a tokenizer" in warning and "reverse_kl" in warning
    assert read_inputs(Recipe.model_validate(recipe_of(tmp_path, "other"))).facts.warnings == ()
    (warning,) = read_inputs(Recipe.model_validate(recipe_of(tmp_path, "lossy", teacher="lower_case"))).facts.warnings
    assert "does not keep all text" in warning


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("rollout", {"overlap": True}, "set rollout.overlap to false"),
        ("stop", {"support": "teacher_top_k"}, "stop.support would do nothing; remove it"),
        ("rollout", {"top_p": 0.9}, "objective.kind cross_tokenizer is biased.*rollout.top_p to 1"),
        ("behaviour", {"kind": "trb"}, "behaviour.kind to student"),
        ("teachers", {"math": {"path": "x"}}, "teachers names math; remove them"),
    ],
)
def test_what_does_not_fit_is_said_in_the_recipe(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    recipe = recipe_of(tmp_path, "refused")
    recipe[section] = recipe.get(section, {}) | change
    if section == "teachers":
        recipe["data"] |= {"teacher_column": "domain"}
    with pytest.raises(ValidationError, match=message) as caught:
        Recipe.model_validate(recipe)
    said = caught.value.errors()[0]["msg"]
    assert not re.search("reverse_kl|eopd", said), f"not for two tokenizers: {said}"


def test_no_objective_that_aligns_text_goes_with_a_blend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not one from outside that does not care who wrote."""

    class Settings(CrossTokenizerSettings):
        kind: Literal["mine"] = "mine"  # type: ignore[assignment]
        reads_the_writer: ClassVar[bool] = False

    class Mine(CrossTokenizer):
        pass

    Mine.Settings = Settings
    monkeypatch.setitem(OBJECTIVES, "mine", Mine)
    recipe = recipe_of(tmp_path, "refused") | {"objective": {"kind": "mine"}}
    Recipe.model_validate(recipe)
    recipe |= {"behaviour": {"kind": "trb"}}
    recipe["teacher"] |= {"gather": "phase"}
    with pytest.raises(
        ValidationError, match=r"behaviour.kind trb lets both models choose .* set behaviour.kind to student"
    ):
        Recipe.model_validate(recipe)


def test_a_teacher_that_cannot_read_the_prompts_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "short")
    teacher = tmp_path / "teacher-unigram"

    def edit(**changes: Any) -> None:
        content = json.loads((teacher / "config.json").read_text()) | changes
        (teacher / "config.json").write_text(json.dumps(content))

    edit(max_position_embeddings=50)
    refused(
        lambda: read_inputs(Recipe.model_validate(recipe)), "tokens for the teacher", "reads 50", "remove long prompts"
    )
    edit(max_position_embeddings=512, vocab_size=len(tokenizer("unigram")) - 1)
    refused(lambda: read_inputs(Recipe.model_validate(recipe)), "teacher.path", "rows for")
    edit(vocab_size=len(tokenizer("unigram")))
    (teacher / "chat_template.jinja").unlink()
    refused(lambda: read_inputs(Recipe.model_validate(recipe)), "teacher's chat template")
