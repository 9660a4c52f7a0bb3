"""All that a run reads besides weights, checked before any model is loaded, and what identifies a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from katds.config import Recipe
from katds.data.benchmarks import Benchmark, load_benchmarks
from katds.data.grading import Grader, make_grader
from katds.data.prompts import PromptSet, load_prompts
from katds.data.retokenize import Bridge
from katds.data.reward import Reward, graded, load_reward
from katds.errors import ConfigError
from katds.models.checks import ModelFacts, check_apart, check_models
from katds.parallel.deepspeed_config import read_deepspeed_json
from katds.schema import flat
from katds.settings import Section

# What may change when a run is resumed: where things lie and how fast they go, not what is computed.
_FREE = (
    "run.name", "run.folder", "run.resume", "run.rollout_samples", "run.lost_after_seconds", "student.path",
    "student.deepspeed", "teacher.path", "teacher.deepspeed", "teacher.gather", "teacher.shard", "data.train", "stop.run",
    "rollout.slots", "rollout.chunk_tokens", "rollout.weights", "rollout.fast_decode", "rollout.overlap", "train.steps",
    "train.epochs", "train.micro_batch_tokens", "train.sequence_parallel", "train.activation_checkpointing", "evaluation",
    "checkpoint", "watch",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `read_inputs` has read. `steps` is the length of the run."""

    tokenizer: Any
    facts: ModelFacts
    prompts: PromptSet
    benchmarks: list[Benchmark]
    grade: Grader | None
    reward: Reward | None
    student_json: dict[str, Any]
    teacher_jsons: list[dict[str, Any]]  # of `Recipe.every_teacher`, in order
    steps: int
    stop_digest: str  # of the files that the stop rule reads
    bridge: Bridge | None = None  # to a teacher with another tokenizer

    @property
    def teacher_vocabulary(self) -> int:
        """Tokens of the teacher; those of its head beyond are padding."""
        return self.facts.tokenizer_size if self.bridge is None else self.bridge.vocabulary


def read_inputs(recipe: Recipe) -> Inputs:
    """Reads and checks files; loads no weights.

    Raises:
        ConfigError: the first thing that would make the run fail.
    """
    student_json = read_deepspeed_json(recipe.student.deepspeed, "student.deepspeed")
    teachers = recipe.every_teacher()
    teacher_jsons = [read_deepspeed_json(each.deepspeed, f"{name}.deepspeed") for name, each in teachers.items()]
    stop_digest = recipe.stop.contents()
    longest = max(recipe.rollout.max_new_tokens, recipe.evaluation.max_new_tokens or 0)
    facts, other = _check_all(recipe, longest)
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.path)
    teacher_tokenizer = None if other is None else AutoTokenizer.from_pretrained(recipe.teacher.path)
    prompts = load_prompts(
        recipe.data.train, tokenizer, recipe.data, seed=recipe.run.seed, teachers=list(recipe.teachers),
        teacher_tokenizer=teacher_tokenizer,
    )  # fmt: skip
    steps = recipe.train.steps or prompts.steps_for(recipe.train.epochs, recipe.rollout.prompts_per_step)
    answered = recipe.data.answer_column is not None or bool(recipe.evaluation.every_benchmark())
    grade = make_grader(recipe.evaluation.grader) if answered else None
    benchmarks = load_benchmarks(recipe, tokenizer)
    reward = _reward(recipe, grade)
    bridge = None
    if other is not None:
        bridge = _bridge(recipe, tokenizer, teacher_tokenizer, other, prompts)
        facts = replace(facts, warnings=(*facts.warnings, *_lossy(recipe, bridge)))
    return Inputs(
        tokenizer, facts, prompts, benchmarks, grade, reward, student_json, teacher_jsons, steps, stop_digest, bridge
    )


def _check_all(recipe: Recipe, longest: int) -> tuple[ModelFacts, ModelFacts | None]:
    """The student against every teacher; or each for itself, where the objective aligns texts: then the teacher's facts, too."""
    if recipe.objective.aligns_text:
        return check_apart(
            recipe.student.path, recipe.teacher.path, recipe.data.max_prompt_tokens, longest, recipe.rollout.end_tokens
        )
    every = [
        check_models(
            recipe.student.path,
            each.path,
            recipe.data.max_prompt_tokens,
            longest,
            f"{name}.path",
            recipe.rollout.end_tokens,
            bool(recipe.teachers),
        )
        for name, each in recipe.every_teacher().items()
    ]
    facts = replace(
        every[0], shared_vocab=min(facts.shared_vocab for facts in every), context=min(facts.context for facts in every),
        warnings=tuple(dict.fromkeys(warning for facts in every for warning in facts.warnings)),
    )  # fmt: skip
    return facts, None


def _bridge(recipe: Recipe, student: Any, teacher: Any, facts: ModelFacts, prompts: PromptSet) -> Bridge:
    """Raises ConfigError where the teacher's context is too short: a response may have more tokens for it than for the student, and ends
    where they are all read."""
    prompt, response = max(len(prompt.teacher_ids) for prompt in prompts), recipe.rollout.max_new_tokens
    if prompt + response > facts.context:
        raise ConfigError(
            f"the longest prompt has {prompt} tokens for the teacher; with rollout.max_new_tokens {response} these are "
            f"{prompt + response}, but teacher.path {recipe.teacher.path} reads {facts.context}. "
            "Lower rollout.max_new_tokens or remove long prompts."
        )
    ends = sorted(facts.eos_ids, key=lambda end: end != teacher.eos_token_id)  # the tokenizer's own first
    return Bridge.of(student, teacher, ends, facts.context, facts.tokenizer_size)


def _lossy(recipe: Recipe, bridge: Bridge) -> tuple[str, ...]:
    if bridge.encode.exact:
        return ()
    return (
        f"the tokenizer of teacher.path {recipe.teacher.path} does not keep all text as it is; what it changes teaches nothing",
    )


def _reward(recipe: Recipe, grade: Grader | None) -> Reward | None:
    if recipe.reward.weight == 0.0:
        return None
    if recipe.reward.function is not None:
        return load_reward(recipe.reward.function)
    assert grade is not None, "the recipe's check lets no reward pass that has nothing to grade"
    return graded(grade)


def identity(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """What must be the same in a run that is resumed: everything that decides what is computed."""
    settings = {key: value for key, value in flat(recipe.model_dump(mode="json")) if not is_free(key)}
    return {
        **settings,
        "train.steps": inputs.steps,
        **({"stop (contents)": inputs.stop_digest} if inputs.stop_digest else {}),
        **({} if inputs.bridge is None else {"teacher.path (tokenizer)": inputs.bridge.digest}),
        "data.train (contents)": prompts_digest(inputs.prompts),
        "student.path (contents)": model_digest(recipe.student.path),
        **{f"{name}.path (contents)": model_digest(each.path) for name, each in recipe.every_teacher().items()},
    }


def at_default(recipe: Recipe) -> set[str]:
    """The settings that have the value of a recipe that does not give them. A kind that is not the default one was given; its other
    settings are compared with that kind's own defaults."""
    return set(_at_default(recipe, ""))


def _at_default(section: Section, prefix: str) -> Iterator[str]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        usual = None if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(value, Section):
            inner = _at_default(value, f"{prefix}{name}.")
            is_given = usual is not None and type(value) is not type(usual)
            yield from (key for key in inner if not (is_given and key == f"{prefix}{name}.kind"))
        elif isinstance(value, list) and any(isinstance(item, Section) for item in value):
            for i, item in enumerate(value):
                item_prefix = f"{prefix}{name}[{i}]."
                yield from (key for key in _at_default(item, item_prefix) if key != f"{item_prefix}kind")
        elif not info.is_required() and value == usual:
            yield f"{prefix}{name}"


def is_free(setting: str) -> bool:
    """Whether a setting, or the section it is in, may change when a run is resumed."""
    setting = re.sub(r"\w+\[\d+\]\.", "", setting)  # an item of a list of sections is one of these sections
    # Of a named teacher's settings only its contents count, which are compared under a name of their own.
    return setting in _FREE or (setting.partition(".")[0] in (*_FREE, "teachers") and "contents" not in setting)


def fingerprint(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """What must be the same on all ranks: every setting, and what was read."""
    return {**dict(flat(recipe.model_dump(mode="json"))), **identity(recipe, inputs)}


def prompts_digest(prompts: PromptSet) -> str:
    """Of all that a model reads or is graded by."""
    digest = hashlib.sha256()
    for prompt in prompts:
        routed = (prompt.teacher,) if prompt.teacher else ()
        other = (prompt.teacher_ids,) if prompt.teacher_ids else ()
        digest.update(repr((prompt.token_ids, prompt.answer, *routed, *other)).encode())
    return digest.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """Configuration, tokenizer, and of the weights names, sizes and headers: reading them all would take minutes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(1 << 20))
    return digest.hexdigest()[:16]
