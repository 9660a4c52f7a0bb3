"""Checks of student and teacher before any weight is read: only config.json, tokenizers and generation_config.json.

The student is trained towards the teacher's distribution token id by token id, so both must mean the same by every id; an objective that
aligns texts takes them as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from katds.errors import ConfigError
from katds.models.folder import ModelFolder, inspect_folder, steady_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What student and teacher agree on."""

    shared_vocab: int  # smaller embedding size of the two; ids from tokenizer_size on are padding and never sampled
    tokenizer_size: int
    tokenizer_sha256: str
    eos_ids: tuple[int, ...]  # the student's, ascending
    context: int  # tokens that both models can attend to
    warnings: tuple[str, ...]
    # The teacher's own, ascending, where it writes in the student's tokens. Ids that no token has are never written.
    teacher_eos_ids: tuple[int, ...] = ()

    @property
    def every_eos(self) -> tuple[int, ...]:
        """End tokens of either model, ascending: where a text ends that the teacher writes for the student."""
        return tuple(sorted({*self.eos_ids, *self.teacher_eos_ids}))


def check_models(
    student: Path,
    teacher: Path,
    max_prompt_tokens: int,
    max_new_tokens: int,
    field: str = "teacher.path",
    end_tokens: Sequence[str] = (),
    several: bool = False,
) -> ModelFacts:
    """Facts about both models. Raises ConfigError where they cannot be distilled; reads no weights. `field` is the setting that named
    the teacher, `end_tokens` those of rollout.end_tokens, `several` whether there are other teachers.

    Order: folders, configurations, tokenizers, vocabulary sizes, end tokens, context.
    """
    models = [_ended_by(inspect_folder("student.path", student), end_tokens), inspect_folder(field, teacher)]
    learner, guide = models
    digest = _same_tokenizer(learner, guide, several)
    size = _tokenizer_size(learner)
    for model in models:
        _check_rows(model, size)
        _check_context(model, max_prompt_tokens, max_new_tokens)
    return ModelFacts(
        shared_vocab=min(map(_vocab, models)),
        tokenizer_size=size,
        tokenizer_sha256=digest,
        eos_ids=_check_eos(learner, size),
        context=min(map(_context, models)),
        warnings=_eos_warnings(learner, guide),
        teacher_eos_ids=tuple(token for token in guide.eos_ids if 0 <= token < size),
    )


def check_apart(
    student: Path, teacher: Path, max_prompt_tokens: int, max_new_tokens: int, end_tokens: Sequence[str] = ()
) -> tuple[ModelFacts, ModelFacts]:
    """Facts about student and teacher, each for itself: they share the text, not the tokens. Raises ConfigError where one of them cannot be
    used; reads no weights. `end_tokens` are those of rollout.end_tokens. Whether the teacher's context holds its
    prompts is not known here."""
    learner, guide = (
        _ended_by(inspect_folder("student.path", student), end_tokens),
        inspect_folder("teacher.path", teacher),
    )
    for model in (learner, guide):
        if not getattr(model.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{model.field} is {model.path}, whose tokenizer is written in Python; texts are aligned with those of the library "
                "tokenizers. Save it with a tokenizer.json."
            )
    _check_context(learner, max_prompt_tokens, max_new_tokens)
    own, other = _alone(learner), _alone(guide)
    if own.tokenizer_sha256 == other.tokenizer_sha256:
        same = "student and teacher share a tokenizer: an objective on tokens, such as reverse_kl, says the same with less noise"
        own = replace(own, warnings=(same,))
    return own, other


def _alone(model: ModelFolder) -> ModelFacts:
    size = _tokenizer_size(model)
    _check_rows(model, size)
    digest = tokenizer_sha256(model.tokenizer)
    return ModelFacts(_vocab(model), size, digest, _check_eos(model, size), _context(model), ())


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all tokens with their ids and of the special ones; equal for equal vocabularies, however stored."""
    special = sorted((i, str(t), bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items())
    content = json.dumps([sorted(tokenizer.get_vocab().items()), special], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _same_tokenizer(student: ModelFolder, teacher: ModelFolder, several: bool) -> str:
    digest = tokenizer_sha256(student.tokenizer)
    if digest == tokenizer_sha256(teacher.tokenizer):
        return digest
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    example = f"{differing[0]!r} is {ours.get(differing[0])} and {theirs.get(differing[0])}" if differing else "flags"
    raise ConfigError(
        f"{teacher.field} is {teacher.path}, whose tokenizer differs from the student's: {len(ours)} and {len(theirs)} "
        f"tokens in the student and the teacher, {len(differing)} differ, such as {example}. "
        + (
            "Take all models from one family; objective.kind cross_tokenizer, which aligns texts, has one teacher."
            if several
            else "Take both models from one family, or give objective.kind: cross_tokenizer, which aligns their texts."
        )
    )


def _ended_by(student: ModelFolder, tokens: Sequence[str]) -> ModelFolder:
    """The student with these end tokens besides its own."""
    vocabulary = student.tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise ConfigError(
            f"rollout.end_tokens has {unknown[0]!r}, which is no token of {student.path}. Its special tokens are "
            f"{', '.join(student.tokenizer.all_special_tokens)}."
        )
    return replace(student, eos_ids=tuple(sorted({*student.eos_ids, *(vocabulary[token] for token in tokens)})))


def _check_eos(model: ModelFolder, size: int) -> tuple[int, ...]:
    ids = model.eos_ids
    if not ids:
        raise ConfigError(
            f"{model.field} is {model.path}, which names no end token. Set eos_token_id in its generation_config.json."
        )
    if ids[0] < 0 or ids[-1] >= size:
        raise ConfigError(
            f"{model.field} is {model.path}, whose eos_token_id {list(ids)} is not among its {size} tokens. "
            "Correct generation_config.json and config.json."
        )
    return ids


def _tokenizer_size(model: ModelFolder) -> int:
    return 1 + max(model.tokenizer.get_vocab().values())


def _check_rows(model: ModelFolder, size: int) -> None:
    if _vocab(model) < size:
        raise ConfigError(
            f"{model.field} is {model.path}, whose embedding has {_vocab(model)} rows for {size} tokens. "
            "Use a checkpoint whose config.json and tokenizer belong together."
        )


def _eos_warnings(student: ModelFolder, teacher: ModelFolder) -> tuple[str, ...]:
    if student.eos_ids == teacher.eos_ids:
        return ()
    return (
        f"end tokens differ: student {list(student.eos_ids)}, teacher {list(teacher.eos_ids)}; rollouts end at the "
        "student's, which the teacher may find improbable; rollout.end_tokens adds to them",
    )


def _vocab(model: ModelFolder) -> int:
    return int(model.config.vocab_size)


def _context(model: ModelFolder) -> int:
    """Longest sequence; YaRN checkpoints often keep max_position_embeddings at the length before scaling."""
    if (steady := steady_tokens(model.config)) is not None:
        return steady
    longest = int(model.config.max_position_embeddings)
    rope = getattr(model.config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    return max(longest, int(original * (rope.get("factor") or 1))) if original else longest


def _check_context(model: ModelFolder, max_prompt_tokens: int, max_new_tokens: int) -> None:
    needed = max_prompt_tokens + max_new_tokens
    if _context(model) < needed:
        steady = steady_tokens(model.config) is not None
        beyond = " before its rotary angles change with the longest text beside (rope_type)" if steady else ""
        raise ConfigError(
            f"data.max_prompt_tokens {max_prompt_tokens} + rollout.max_new_tokens {max_new_tokens} = {needed} tokens, "
            f"but {model.field} {model.path} reads {_context(model)}{beyond}. Lower one of them."
        )
