"""What a run has computed, in floating-point operations, from its recipe and its counts.

A token that a model reads costs 2 operations per weight that it is multiplied with (embedding look-ups are none), and 4 x layers x
heads x head size for every earlier token and itself, which attention reads. The output head is only for tokens that are written, scored or
learnt from, not for prompts. The student reads what it writes, what it overshoots, and each prompt once; the teacher the same; the
learner reads prompt and kept tokens, at 3 times the price: a backward costs two forwards (4 with activation checkpointing, which does not
recompute the head). Norms, activations, softmax, sampling, the optimizer and evaluations are left out; so is what a sliding window saves,
and what is read twice of a head: the teacher's by an objective over the whole vocabulary (objective.support full, jsd) when it learns,
the student's by stop.support teacher_top_k.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from katds.config import Recipe
from katds.core import lengths
from katds.core.lengths import StepLengths
from katds.errors import ConfigError
from katds.sections import DataConfig


@dataclass(frozen=True)
class Cost:
    """Operations of a model's forward: per token before its output head, per pair of a token and one that it attends to, and of the head
    per token that has one."""

    token: int
    pair: int
    head: int

    def body(self, tokens: float, pairs: float) -> float:
        return self.token * tokens + self.pair * pairs


@dataclass(frozen=True)
class Batch:
    """Rollouts of one kind; tokens are means over them, `learned` those of the kept that the loss reads. Attention grows with the square of
    the length, so that the mean of unequal rollouts gives a little less than their sum."""

    rollouts: float
    prompt: float
    decoded: float
    kept: float
    learned: float


def training_flops(student: Cost, teacher: Cost, batches: Iterable[Batch], samples: int, recomputed: bool) -> float:
    """Of rollouts and updates. `samples`: rollouts that share the reading of a prompt."""
    total, passes = 0.0, 4 if recomputed else 3
    for batch in batches:
        prompt = triangle(batch.prompt)
        read = batch.prompt / samples + batch.decoded
        pairs = prompt / samples + triangle(batch.prompt + batch.decoded) - prompt
        rollout = sum(model.body(read, pairs) + model.head * batch.decoded for model in (student, teacher))
        again = batch.prompt + batch.kept - 1  # the last token is never read
        update = passes * student.body(again, triangle(again)) + 3 * student.head * batch.learned
        total += batch.rollouts * (rollout + (update if batch.learned else 0.0))
    return total


def triangle(tokens: float) -> float:
    """Pairs of a token and one before it or itself."""
    return tokens * (tokens + 1) / 2


def run_flops(recipe: Recipe, folder: Path, summary: dict[str, Any]) -> float | None:
    """Of the run in `folder`; None where this page's sum is not that of the method: a teacher that writes, or writes along, reads more than
    the rollouts, one with another tokenizer reads other tokens, and several teachers differ in size.

    What summary.json lacks is taken from elsewhere: prompt tokens from the data, the tokens of a step from metrics.jsonl, those of a
    rollout from lengths.jsonl."""
    rollout = recipe.rollout
    usual = recipe.behaviour == type(recipe).model_fields["behaviour"].default
    if recipe.teachers or recipe.teacher_writes or recipe.objective.aligns_text or not usual:
        return None
    assert recipe.train.steps is not None
    prompts = prompt_tokens(
        str(recipe.student.path),
        recipe.data.model_dump_json(),
        recipe.run.seed,
        rollout.prompts_per_step,
        recipe.train.steps,
    )
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if "rollout/length_mean" in record]
    known = _known(folder, len(records))
    overshoot = summary["decoded_tokens"] / summary["rollout_tokens"]
    share = summary.get("learned_tokens", summary["kept_tokens"]) / max(1, summary["kept_tokens"])
    count = rollout.prompts_per_step * rollout.samples_per_prompt
    steps = zip(prompts, records, known, strict=True)
    batches = (
        batch for prompt, record, step in steps for batch in _batches(count, prompt, record, step, overshoot, share)
    )
    student, teacher = model_cost(recipe.student.path), model_cost(recipe.teacher.path)
    return training_flops(student, teacher, batches, rollout.samples_per_prompt, recipe.train.activation_checkpointing)


def _known(folder: Path, steps: int) -> list[StepLengths]:
    """The recorded lengths, or nothing of every step where a run has no whole record: one that began before there were records, or
    whose rollouts are all in the audit group."""
    try:
        known = lengths.read(folder)
    except ConfigError:
        known = []
    return known if len(known) == steps else [StepLengths([], [], [])] * steps


def _batches(
    count: int, prompt: float, record: dict[str, float], known: StepLengths, overshoot: float, share: float
) -> Iterator[Batch]:
    """Each rollout whose length is known, and the mean of the others: the audit group. `share`: of kept tokens, what the loss reads, in
    all of the run."""
    for length, kept in zip(known.lengths, known.kept, strict=True):
        yield Batch(1, prompt, length * overshoot, kept, kept * share)
    if others := count - len(known.lengths):
        mean_length, mean_kept = (
            (record[f"rollout/{key}_mean"] * count - sum(tokens)) / others
            for key, tokens in (("length", known.lengths), ("kept", known.kept))
        )
        yield Batch(others, prompt, mean_length * overshoot, mean_kept, mean_kept * share)


@cache
def prompt_tokens(student: str, data: str, seed: int, per_step: int, steps: int) -> list[float]:
    """Mean length of each step's prompts. `data`: that section of the recipe as JSON, which unlike the section can be a key."""
    from transformers import AutoTokenizer

    from katds.data.prompts import load_prompts

    section = DataConfig.model_validate_json(data)
    prompts = load_prompts(section.train, AutoTokenizer.from_pretrained(student), section, seed=seed)
    batches = (prompts.batch(step * per_step, per_step) for step in range(steps))
    return [sum(len(prompt.token_ids) for prompt in batch) / per_step for batch in batches]


@cache
def model_cost(path: Path) -> Cost:
    """Of the model in a Hugging Face folder; reads its config.json only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    return Cost(2 * (weights - head), 4 * config.num_hidden_layers * config.num_attention_heads * head_dim, 2 * head)
