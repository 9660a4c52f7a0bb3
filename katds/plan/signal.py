"""What a step keeps of every token for the loss: sizes of the signal's rows, and an objective's tile without numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from katds.config import Recipe
from katds.core.collective import Solo
from katds.core.objectives import Objective
from katds.core.objectives.base import Progress
from katds.core.types import Field, Need, RolloutBatch

Tile = Callable[..., dict[str, torch.Tensor]]
TOKEN_BYTES = 8  # of an id on its way to the rank that learns from it


@dataclass(frozen=True)
class SignalShape:
    """Of a recipe's objective and stop rule.

    Args:
        divergence: the stop rule reads the per-token divergence.
        vocabulary: the student's.
        hidden, width: the teacher's hidden size and bytes of an element.
        guided: the objective reads prefixes by the teacher, which have rows of their own.
    """

    recipe: Recipe
    objective: Objective
    divergence: bool
    vocabulary: int
    hidden: int
    width: int
    guided: bool

    @property
    def needs(self) -> frozenset[Need]:
        """What is kept for the objective, and for a reward's advantage."""
        return self.objective.needs | ({Need.WRITTEN} if self.recipe.reward.weight else frozenset())

    @property
    def by_teacher(self) -> bool:
        """Whether the divergence is that on the teacher's most probable tokens."""
        reads: bool = self.recipe.stop.reads_teacher_top_k
        return reads

    @property
    def top_k(self) -> int:
        """Of the student's tokens, kept as it writes."""
        wanted = (self.divergence and not self.by_teacher) or Need.STUDENT_TOP_K in self.needs
        return min(self.recipe.rollout.divergence_top_k, self.vocabulary) if wanted else 0

    @property
    def teacher_top_k(self) -> int:
        return self.objective.teacher_top_k or self.recipe.rollout.divergence_top_k

    @property
    def bytes(self) -> int:
        """Of one row, as the engine makes it."""
        sizes = {
            Need.SAMPLED: 4, Need.STUDENT_TOP_K: 8 * self.top_k, Need.TEACHER_TOP_K: 8 * self.teacher_top_k, Need.ENTROPY: 4,
            Need.FULL: self.hidden * self.width, Need.WRITTEN: 4, Need.STUDENT_ENTROPY: 4, Need.CHUNKS: 12,
        }  # fmt: skip
        return sum(sizes[need] for need in self.needs) + self.guided

    @cached_property
    def made_bytes(self) -> int:
        """Of one row, what the objective adds to it before rollouts are dealt: its own answer for a rank without rollouts."""
        pen: object = object()  # nothing is written without a token
        made = self.objective.prepare(RolloutBatch([], {}), Progress(0, 1, 0, pen), Solo())  # type: ignore[arg-type]
        own = sum(values.element_size() * math.prod(values.shape[1:]) for values in made.values())
        reward = 4 if self.recipe.reward.weight else 0
        return own + reward + (4 if self.guided else 0)  # prefixes are weighted

    @property
    def learnt_bytes(self) -> int:
        """Of one row at the learner."""
        return self.bytes + self.made_bytes

    def tile(self) -> Tile:
        """The objective's tile on the meta device, with a signal of every field. One object for all recipes whose tiles are the same."""
        key = (type(self.objective), self.recipe.objective.model_dump_json(), self.top_k, self.teacher_top_k)
        return _TILES.setdefault(key, self._tile())

    def _tile(self) -> Tile:
        def tile(logprobs: torch.Tensor, at: slice, *others: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = logprobs.shape[0]

            def field(*more: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                return torch.empty(rows, *more, dtype=dtype, device="meta")

            student, teacher, ids = self.top_k or 1, self.teacher_top_k, torch.int32
            horizon = getattr(self.recipe.objective, "horizon", 1)  # of guiding tokens
            signal = {key: field() for key in (Field.SAMPLED, Field.ENTROPY, Field.WRITTEN, Field.STUDENT_ENTROPY)}
            signal |= {Field.STUDENT_TOP: field(student), Field.STUDENT_TOP_IDS: field(student, dtype=ids)}
            signal |= {Field.TEACHER_TOP: field(teacher), Field.TEACHER_TOP_IDS: field(teacher, dtype=ids)}
            signal |= {key: field() for key in (Field.WEIGHT, Field.REWARD, Field.ADVANTAGE)}
            signal |= {Field.CHUNK_TEACHER: field(), Field.CHUNK_STUDENT: field(), Field.CHUNK_TOKENS: field(dtype=ids)}
            signal |= {Field.GUIDE_IDS: field(horizon, dtype=ids), Field.GUIDE_WEIGHTS: field(horizon)}
            signal |= {key: field(dtype=torch.bool) for key in (Field.TRUSTED, Field.LEARNED, Field.GUIDED)}
            if others:
                (signal[Field.TEACHER_LOGPROBS],) = others
            return self.objective.tile(logprobs, field(dtype=torch.int64), signal)

        return tile


_TILES: dict[tuple[Any, ...], Tile] = {}
