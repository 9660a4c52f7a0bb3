"""Cross-tokenizer on-policy distillation (arXiv 2606.09456): student and teacher share the text, not the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch

from katds.core.alignment import LARGEST_ADVANTAGE
from katds.core.collective import Collective
from katds.core.objectives.aligned import aligned, gathered, student_entropy
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.clipped import clipped_policy_gradient
from katds.core.objectives.rows import outside_holes, rows_of
from katds.core.objectives.sampled import Clip, SampledSettings
from katds.core.types import Field, Need, RolloutBatch, Signal

_CERTAIN = 1e-8  # a chunk that the student was surer of has no shares


class CrossTokenizerSettings(SampledSettings):
    """Sampled reverse KL of chunks of text, for a teacher with another tokenizer (arXiv 2606.09456)."""

    kind: Literal["cross_tokenizer"] = "cross_tokenizer"
    reads_the_writer: ClassVar[bool] = True

    @property
    def aligns_text(self) -> bool:
        return True


class CrossTokenizer(Objective):
    """sum_i L_i with the clipped policy gradient L_i of the advantage A_i = (L_T / L_S - 1) log p_i, at most 10 either way.

    A chunk is the shortest text that both tokenizers have a boundary after. L_S is the sum of its log p_i, as the student wrote
    them, L_T the teacher's log-likelihood of the same text. The A_i of a chunk add up to L_T - L_S, each token's share being that
    of its log p_i; in a chunk of one token on each side A is log q - log p. Where |L_S| < 1e-8 there are no shares: L_T / n for
    each of n tokens.

    Tokens of chunks with more than 6 tokens on a side have no advantage (published). Open, and chosen here: they are left out of
    the loss and of the count that it is divided by, as are those of chunks whose text the teacher's tokenizer cannot say: nothing is
    known of them, and how many there are must not dilute the others; log p_i is that of writing in later updates, too, as an advantage
    is in PPO; a chunk that a stop rule cuts apart keeps the advantages of its first tokens, which were written as the chunk began.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = CrossTokenizerSettings
    needs = frozenset({Need.CHUNKS, Need.WRITTEN})

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._learned_share: float | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(Clip(settings.clip_low, settings.clip_high))

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective: ADVANTAGE and LEARNED, [T]; one sum of two counts."""
        tokens_T = rows_of(batch, Field.CHUNK_TOKENS)
        learned_T = tokens_T > 0
        advantage_T = advantages(
            rows_of(batch, Field.CHUNK_TEACHER),
            rows_of(batch, Field.CHUNK_STUDENT),
            tokens_T,
            rows_of(batch, Field.WRITTEN),
        )
        open_T = outside_holes(batch.rollouts).to(learned_T.device)
        counts = torch.stack([(learned_T & open_T).sum(), open_T.sum()]).cpu()
        taken, total = collective.sum(counts).tolist()
        self._learned_share = taken / total if total else None
        return {Field.ADVANTAGE: advantage_T, Field.LEARNED: learned_T}

    def metrics(self) -> Mapping[str, float]:
        """`learned_share` of the step's tokens: those in chunks that have an advantage."""
        return {} if self._learned_share is None else {"learned_share": self._learned_share}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (L_S - L_T of the chunks as written, spread evenly), "entropy" (of the student)}; see `Objective.tile`."""
        logprobs_T = gathered(logprobs_TV, actions_T.unsqueeze(-1)).squeeze(-1)
        keys = (Field.WRITTEN, Field.ADVANTAGE, Field.CHUNK_STUDENT, Field.CHUNK_TEACHER, Field.CHUNK_TOKENS)
        written_T, advantage_T, student_T, teacher_T, tokens_T = (aligned(signal, key, logprobs_TV) for key in keys)
        losses_T = clipped_policy_gradient(logprobs_T, written_T, advantage_T, *self._clip)
        divergence_T = (student_T - teacher_T) / tokens_T.clamp(min=1)
        return {"loss": losses_T.sum(), "kl": divergence_T.sum(), "entropy": student_entropy(logprobs_TV)}


def advantages(
    teacher_T: torch.Tensor, student_T: torch.Tensor, tokens_T: torch.Tensor, written_T: torch.Tensor
) -> torch.Tensor:
    """A_i of each token, [T] nats, from L_T and L_S of its chunk, the chunk's student tokens (0: no signal) and log p_i."""
    certain_T = student_T.abs() < _CERTAIN
    # The same as (L_T / L_S - 1) log p_i, and exact where the chunk is the token.
    shared_T = (teacher_T - student_T) * (written_T / torch.where(certain_T, 1.0, student_T))
    spread_T = teacher_T / tokens_T.clamp(min=1)
    return torch.where(certain_T, spread_T, shared_T).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
