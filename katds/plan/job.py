"""A recipe as planning sees it: models without weights, what a step asks for, and how its rollouts are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from katds.assemble import make_behaviour, make_objective, make_rule
from katds.config import Recipe
from katds.core.behaviours import Behaviour
from katds.core.objectives import Objective
from katds.core.packing import Plan, plan
from katds.core.types import Prompt, RolloutRequest
from katds.models.native.forward import FAMILIES
from katds.models.slot_cache import PAGE
from katds.parallel.deepspeed_config import read_deepspeed_json
from katds.plan.lengths import WHOLE, Lengths, Prompts
from katds.plan.models import ModelShape, Order
from katds.plan.signal import SignalShape
from katds.plan.zero import ZeroSettings


@dataclass(frozen=True)
class Teacher:
    """`shard`: the ranks that share one set of shards: "world", "node", or so many."""

    shape: ModelShape
    zero: ZeroSettings
    gather: str
    shard: str | int = "world"


@dataclass(frozen=True)
class Job:
    """One step of a recipe on `ranks` ranks.

    Args:
        device: "cuda" or "cpu".
        divergence: the stop rule reads the per-token divergence.
        behaviour: who writes; the plan is of the first step.
        per_node: ranks of a node.
    """

    recipe: Recipe
    student: ModelShape
    zero: ZeroSettings
    teachers: tuple[Teacher, ...]
    objective: Objective
    divergence: bool
    behaviour: Behaviour
    prompts: Prompts
    lengths: Lengths
    ranks: int
    device: str
    per_node: int = 8

    @classmethod
    def of(
        cls, recipe: Recipe, ranks: int, device: str, prompts: Prompts, lengths: Lengths, steps: int, per_node: int = 8
    ) -> Job:
        """Reads the models' config.json and DeepSpeed's files. Raises ConfigError."""

        def zero_of(section: str, each: Any, optimizer: bool) -> ZeroSettings:
            field = f"{section}.deepspeed"
            return ZeroSettings.of(read_deepspeed_json(each.deepspeed, field), field, device, optimizer)

        zero = zero_of("student", recipe.student, optimizer=True)
        teachers = []
        for name, each in recipe.every_teacher().items():
            held = zero_of(name, each, optimizer=False)
            shape = ModelShape.read(each.path, held.dtype, f"{name}.path")
            teachers.append(Teacher(shape, held, each.gather, each.shard))
        return cls(
            recipe, ModelShape.read(recipe.student.path, zero.dtype, "student.path"), zero, tuple(teachers),
            make_objective(recipe), make_rule(recipe, steps).needs_divergence,
            make_behaviour(recipe, steps), prompts, lengths, ranks, device, per_node,
        )  # fmt: skip

    def on(self, ranks: int) -> Job:
        return replace(self, ranks=ranks)

    def with_settings(self, section: str, **values: Any) -> Job:
        """With other values in a section of the recipe."""
        changed = getattr(self.recipe, section).model_copy(update=values)
        return replace(self, recipe=self.recipe.model_copy(update={section: changed}))

    def holders(self, teacher: Teacher) -> int:
        """Ranks that share one set of a teacher's shards."""
        wanted = {"world": self.ranks, "node": self.per_node}.get(str(teacher.shard), teacher.shard)
        return min(int(wanted), self.ranks)

    @property
    def on_node(self) -> int:
        """Ranks of the fullest node."""
        return min(self.ranks, self.per_node)

    @property
    def guided(self) -> bool:
        """The teacher writes along."""
        return self.behaviour.at(0) is not None

    @cached_property
    def prefixes(self) -> list[int]:
        """Tokens that the teacher writes first, of each rollout; none: it does not."""
        if not self.behaviour.teacher_writes:
            return []
        longest, seed = self.recipe.rollout.max_new_tokens, self.recipe.run.seed
        requests = (RolloutRequest(i, Prompt(i, ()), longest) for i in range(self.per_step))
        return [self.behaviour.prefix(request, 0, seed) for request in requests]

    @property
    def before(self) -> float:
        """Tokens before the student's, in the mean: of the prompt, and of the teacher's prefix."""
        return self.prompts.mean + self.prefix

    @property
    def prefix(self) -> float:
        """Tokens that the teacher writes first, in the mean."""
        return sum(self.prefixes) / max(1, len(self.prefixes))

    @property
    def reading(self) -> float:
        """Tokens of the teacher for one of the student."""
        return self.prompts.reading

    @cached_property
    def signal(self) -> SignalShape:
        shape = self.teachers[0].shape
        learned = bool(self.prefixes) and self.objective.reads_prefix
        return SignalShape(
            self.recipe, self.objective, self.divergence, self.student.vocabulary, shape.hidden, shape.width, learned
        )

    @property
    def update_order(self) -> Order:
        """The student's modules, as a forward and its backward enter them."""
        checkpointing = self.recipe.train.activation_checkpointing
        return self.student.checkpointed_order if checkpointing else self.student.update_order

    @property
    def per_step(self) -> int:
        """Rollouts of a step over all ranks."""
        return self.recipe.rollout.prompts_per_step * self.recipe.rollout.samples_per_prompt

    @property
    def rollouts(self) -> int:
        """Of a rank, at most."""
        return -(-self.per_step // self.ranks)

    @property
    def slots(self) -> int:
        return min(self.recipe.rollout.slots, self.per_step)

    @property
    def overshoot(self) -> int:
        return self.recipe.rollout.chunk_tokens * (2 if self.recipe.rollout.overlap else 1)

    @property
    def cache_length(self) -> int:
        """Positions of a slot."""
        length = self.prompts.longest + self.recipe.rollout.max_new_tokens + self.overshoot
        return -(-length // PAGE) * PAGE if self.device == "cuda" else length

    @property
    def in_c(self) -> bool:
        """Whether forwards over slots go through katds's C code: where there is a compiler, which is taken for granted."""
        family = self.student.config.model_type in FAMILIES
        return (
            self.device == "cpu" and self.student.dtype == torch.float32 and self.recipe.rollout.fast_decode and family
        )

    def draw(self, lengths: Lengths, seed: int) -> tuple[list[int], list[int]]:
        return lengths.draw(self.per_step, seed, self.recipe.rollout.audit_fraction)

    @cached_property
    def drawn(self) -> tuple[list[int], list[int]]:
        """Tokens written and kept of a step's rollouts, by the student."""
        written, kept = self.draw(self.lengths, seed=0)
        if not self.prefixes or self.lengths.source != WHOLE:
            return written, kept
        # With its prefix a rollout is at most as long as one may be.
        room = [self.recipe.rollout.max_new_tokens - prefix for prefix in self.prefixes]
        return [min(pair) for pair in zip(written, room, strict=True)], [
            min(pair) for pair in zip(kept, room, strict=True)
        ]

    @property
    def decoded_rows(self) -> int:
        """Tokens that a rank decodes and scores in a step, overshoot included: of the rank with the most, were they dealt at random."""
        chunk, extra = self.recipe.rollout.chunk_tokens, self.overshoot - self.recipe.rollout.chunk_tokens
        rows = [-(-length // chunk) * chunk + extra for length in self.drawn[0]]
        return max(sum(rows[rank :: self.ranks]) for rank in range(min(self.ranks, len(rows))))

    @property
    def kept_rows(self) -> int:
        """Rows of a step's signal that a rank learns from, about."""
        prefixes = sum(self.prefixes) if self.signal.guided else 0
        return -(-(sum(self.drawn[1]) + prefixes) // self.ranks)

    @cached_property
    def micro_batches(self) -> list[list[list[int]]]:
        """Of every rank, the learnt tokens of the rollouts in each micro-batch of the first minibatch: the learner's own packing."""
        taken = self.drawn[1][:: self.recipe.train.minibatches]
        lengths = [round(self.before) + kept - 1 for kept in taken if kept]
        owners = [i % self.ranks for i in range(len(lengths))]
        packing = self.packing(lengths, owners)
        return [[[lengths[i] for i in batch] for batch in rank] for rank in packing.micro_batches]

    @property
    def sharers(self) -> int:
        """Ranks that share a micro-batch."""
        return min(self.recipe.train.sequence_parallel, self.ranks)

    def packing(self, lengths: Sequence[int], owners: Sequence[int]) -> Plan:
        """The learner's own, of rollouts of so many tokens that these ranks have written."""
        size, weight = self.sharers, self.student.attention_weight
        groups = [owner // size for owner in owners]
        return plan(lengths, groups, self.ranks // size, size * self.recipe.train.micro_batch_tokens, weight).shared(
            size
        )

    @property
    def micro_batch_tokens(self) -> int:
        """Of a rank's part of the largest micro-batch that the recipe allows and a step may have."""
        longest = self.prompts.longest + self.recipe.rollout.max_new_tokens - 1
        if self.lengths.source == WHOLE:
            return -(
                -max((sum(batch) for rank in self.micro_batches for batch in rank), default=longest) // self.sharers
            )
        fits = self.recipe.train.micro_batch_tokens * self.sharers
        return -(-max(longest, min(fits, self.sharers * self.rollouts * longest)) // self.sharers)
