"""What is found out about student and teacher before a weight is read.

The weight files here are empty: a check that opened one would fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from messages import refused
from transformers import AutoTokenizer, Qwen3Config
from zoo import tokenizer

from katds.models.checks import ModelFacts, check_models, tokenizer_sha256

TOKENS = len(tokenizer())
EOS = tokenizer().eos_token_id


def folder(path: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A checkpoint without weights; keywords are set in config.json, None removes a key."""
    settings = {"vocab_size": TOKENS, "max_position_embeddings": 512, "eos_token_id": EOS, "hidden_size": 32} | config
    Qwen3Config(num_hidden_layers=1, **{k: v for k, v in settings.items() if k == "hidden_size"}).save_pretrained(path)
    edit(path / "config.json", **settings)
    tokenizer().save_pretrained(path)
    (path / "model.safetensors").touch()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "student"), folder(tmp_path / "teacher")


def check(pair: tuple[Path, Path], prompt: int = 100, new: int = 400) -> ModelFacts:
    return check_models(*pair, prompt, new)


def test_facts_of_a_good_pair(pair: tuple[Path, Path]) -> None:
    facts = check(pair)
    assert (facts.shared_vocab, facts.tokenizer_size, facts.context) == (TOKENS, TOKENS, 512)
    assert facts.eos_ids == (EOS,) and facts.warnings == ()
    assert facts.tokenizer_sha256 == tokenizer_sha256(AutoTokenizer.from_pretrained(pair[1]))


def test_paddings_of_the_embedding_may_differ(pair: tuple[Path, Path]) -> None:
    edit(pair[0] / "config.json", vocab_size=TOKENS + 3)
    edit(pair[1] / "config.json", vocab_size=TOKENS + 7)
    facts = check(pair)
    assert (facts.shared_vocab, facts.tokenizer_size) == (TOKENS + 3, TOKENS)
    edit(pair[1] / "config.json", vocab_size=TOKENS - 1)
    refused(lambda: check(pair), "teacher.path", f"{TOKENS - 1} rows for {TOKENS} tokens")


def test_another_tokenizer_is_refused(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["w3"], vocab["w4"] = vocab["w4"], vocab["w3"]
    path.write_text(json.dumps(content))
    refused(lambda: check(pair), "teacher.path", "2 differ", f"'w3' is {vocab['w4']} and {vocab['w3']}", "family")


def test_hash_depends_on_special_tokens_and_not_on_order() -> None:
    plain, special = tokenizer(), tokenizer()
    assert tokenizer_sha256(plain) == tokenizer_sha256(special)
    special.add_special_tokens({"bos_token": "w3"})
    assert tokenizer_sha256(plain) != tokenizer_sha256(special)


def test_end_tokens_are_the_union_of_all_three_files(tmp_path: Path) -> None:
    student = folder(tmp_path / "s", generation={"eos_token_id": [5, 7]}, eos_token_id=6)
    teacher = folder(tmp_path / "t", eos_token_id=None)
    facts = check((student, teacher))
    assert facts.eos_ids == facts.every_eos == tuple(sorted((EOS, 5, 6, 7)))
    assert facts.teacher_eos_ids == (EOS,)
    assert (
        len(facts.warnings) == 1 and str(list(facts.eos_ids)) in facts.warnings[0] and f"[{EOS}]" in facts.warnings[0]
    )


def test_a_template_s_end_token_joins_the_students_own(tmp_path: Path) -> None:
    """A base model ends with another token than the chat model that teaches it."""
    base, chat = folder(tmp_path / "base"), folder(tmp_path / "chat", generation={"eos_token_id": [EOS, 7]})
    (warning,) = check((base, chat)).warnings
    assert "rollout.end_tokens" in warning
    (seven,) = [token for token, i in tokenizer().get_vocab().items() if i == 7]
    facts = check_models(base, chat, 100, 400, end_tokens=[seven])
    assert facts.eos_ids == (EOS, 7) and facts.warnings == ()
    refused(lambda: check_models(base, chat, 100, 400, end_tokens=["<|im_end|>"]), "rollout.end_tokens", "'<|im_end|>'")


def test_a_teacher_s_own_end_tokens_are_known_as_far_as_they_are_tokens(tmp_path: Path) -> None:
    teacher = folder(tmp_path / "t", generation={"eos_token_id": [9, TOKENS + 3]}, eos_token_id=8)
    facts = check((folder(tmp_path / "s"), teacher))
    assert facts.eos_ids == (EOS,)
    assert facts.teacher_eos_ids == facts.every_eos == tuple(sorted((EOS, 8, 9)))


def test_a_student_without_end_token_is_refused(pair: tuple[Path, Path]) -> None:
    for path in pair:
        edit(path / "config.json", eos_token_id=None)
        edit(path / "tokenizer_config.json", eos_token=None)
    refused(lambda: check(pair), "student.path", "no end token", "eos_token_id")
    edit(pair[0] / "config.json", eos_token_id=TOKENS + 1)
    refused(lambda: check(pair), "student.path", f"[{TOKENS + 1}]", f"{TOKENS} tokens")


@pytest.mark.parametrize(("which", "field"), [(0, "student.path"), (1, "teacher.path")])
def test_context_must_hold_prompt_and_response(pair: tuple[Path, Path], which: int, field: str) -> None:
    edit(pair[which] / "config.json", max_position_embeddings=499)
    refused(lambda: check(pair), field, "100 + rollout.max_new_tokens 400 = 500", "reads 499")
    assert check(pair, new=399).context == 499


def test_yarn_lengthens_the_context(pair: tuple[Path, Path]) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
    for path in pair:
        edit(path / "config.json", rope_parameters=yarn)
    assert check(pair, new=1900).context == 2048


@pytest.mark.parametrize(("which", "field"), [(0, "student.path"), (1, "teacher.path")])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 64,
            "long_factor": [4.0] * 64,
            "original_max_position_embeddings": 512,
        },
    ],
)
def test_angles_that_change_with_the_longest_text_limit_the_context(
    pair: tuple[Path, Path], which: int, field: str, rope: dict[str, Any]
) -> None:
    """A rollout would depend on those beside it."""
    for place, path in enumerate(pair):
        edit(path / "config.json", max_position_embeddings=4096 if place == which else 8192)
    longest = 4096 if rope["rope_type"] == "dynamic" else 512
    edit(pair[which] / "config.json", rope_parameters=rope | {"rope_theta": 10000.0})
    assert check(pair, new=longest - 100).context == longest
    refused(lambda: check(pair, new=longest - 99), field, f"reads {longest} before its rotary angles change")


@pytest.mark.parametrize(("which", "field"), [(0, "student.path"), (1, "teacher.path")])
@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"auto_map": {"AutoModel": "m.M"}}, ["auto_map", "remote code is never trusted"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised", "bf16"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0", "linear head"]),
        ({"logits_scaling": 8.0}, ["logits_scaling = 8.0"]),
        ({"logit_scale": 0.0625}, ["logit_scale = 0.0625"]),
        ({"model_type": "t5"}, ["'t5' model", "decoder-only"]),
        (
            {"architectures": ["Qwen3ForSequenceClassification"]},
            ["Qwen3ForSequenceClassification", "language model head"],
        ),
        ({"model_type": "unheard-of"}, ["cannot be read", "unheard-of"]),
    ],
)
def test_configurations_that_cannot_work(pair, which, field, changes, pieces) -> None:  # type: ignore[no-untyped-def]
    edit(pair[which] / "config.json", **changes)
    refused(lambda: check(pair), f"{field} is {pair[which]}", *pieces)


def test_neutral_logit_settings_are_accepted(pair: tuple[Path, Path]) -> None:
    edit(pair[0] / "config.json", logits_scaling=1.0, logit_scale=1)
    assert check(pair).tokenizer_size == TOKENS


def test_incomplete_folders_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    refused(lambda: check((tmp_path / "Qwen/Qwen3-8B", teacher)), "student.path", "no folder", "hub")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    (teacher / "model.safetensors").rename(teacher / "model-1.safetensors")
    refused(lambda: check(pair), "teacher.path", "lacks 1 of 2 weight files", "model-2.safetensors")
    (teacher / "model-1.safetensors").rename(teacher / "pytorch_model.bin")
    refused(lambda: check(pair), "teacher.path", "safetensors only")
    (student / "config.json").write_text("{")
    refused(lambda: check(pair), "student.path", "config.json cannot be read")
    (student / "config.json").unlink()
    refused(lambda: check(pair), "student.path", "no config.json")


def test_a_folder_without_tokenizer_is_refused(pair: tuple[Path, Path]) -> None:
    for path in pair[1].glob("tokenizer*"):
        path.unlink()
    refused(lambda: check(pair), "teacher.path", "has no tokenizer")
    (pair[1] / "tokenizer.json").write_text("{")
    refused(lambda: check(pair), "teacher.path", "configuration or tokenizer cannot be read")
