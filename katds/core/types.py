"""The few types that travel between prompts, rollout engine, stop rule and learner.

Shape legend of the whole project: S slot, C position in a chunk, T packed token, V vocabulary, K top-k, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch

# Why a rollout ended by itself. Stop rules add reasons of their own; all are mirrored as the metrics `stop/<reason>`.
EOS = "eos"  # the student wrote an end token
LENGTH = "length"  # the response reached its maximum length


class Need(StrEnum):
    """What an objective asks for at every response position: of the teacher, or of the student as it wrote."""

    SAMPLED = "sampled"  # log q of the sampled token
    STUDENT_TOP_K = "student_top_k"  # log q at the student's K most probable tokens
    TEACHER_TOP_K = "teacher_top_k"  # the teacher's K most probable tokens with their log q
    ENTROPY = "entropy"  # entropy of q
    FULL = "full"  # q over the whole vocabulary, kept as hidden states and unrolled tile by tile
    WRITTEN = "written"  # log p of the sampled token when it was written
    STUDENT_ENTROPY = "student_entropy"  # entropy of p when the token was written
    CHUNKS = "chunks"  # log-likelihoods of the pieces of text that both tokenizers have a boundary after


class Field(StrEnum):
    """Keys of a signal. Every tensor's first axis is the response token.

    Student and teacher are both taken at the rollout temperature, before top-k, top-p and min-p. What an objective makes in
    `prepare` lies beside what it asked for.
    """

    SAMPLED = "sampled"  # [T] float32
    STUDENT_TOP_IDS = "student_top_ids"  # [T, K] int32
    STUDENT_TOP = "student_top"  # [T, K] float32, teacher log-probabilities at STUDENT_TOP_IDS
    TEACHER_TOP_IDS = "teacher_top_ids"  # [T, K] int32
    TEACHER_TOP = "teacher_top"  # [T, K] float32
    ENTROPY = "entropy"  # [T] float32, nats
    HIDDEN = "hidden"  # [T, H] the teacher's last hidden state
    TEACHER_LOGPROBS = "teacher_logprobs"  # [T, V] float32, exists only inside one vocabulary tile
    WRITTEN = "written"  # [T] float32
    STUDENT_ENTROPY = "student_entropy"  # [T] float32, nats
    LEARNED = "learned"  # [T] bool, made by `prepare`: False leaves the token out of loss and count
    WEIGHT = "weight"  # [T] float32, made by `prepare`
    TRUSTED = "trusted"  # [T] bool, made by `prepare`
    CHUNK_TEACHER = (
        "chunk_teacher"  # [T] float32, L_T: the teacher's log-likelihood of the chunk of text around the token
    )
    CHUNK_STUDENT = "chunk_student"  # [T] float32, L_S: the student's, as it wrote it
    CHUNK_TOKENS = "chunk_tokens"  # [T] int32, student tokens of the chunk; 0: the chunk teaches nothing
    ADVANTAGE = "advantage"  # [T] float32, made by `prepare`
    REWARD = "reward"  # [T] float32, an advantage made by `prepare`
    DISTILLED = "distilled"  # [T] bool, made by `prepare`: False leaves the token to the reward alone
    GUIDE_IDS = "guide_ids"  # [T, N] int32, tokens that the teacher wrote, made by `prepare`
    GUIDE_WEIGHTS = "guide_weights"  # [T, N] float32, of the tokens at GUIDE_IDS, made by `prepare`
    GUIDED = "guided"  # [T] bool, with `Objective.reads_prefix`: a teacher's token before the response; in the loss, not in its count


FIELDS: Mapping[Need, tuple[Field, ...]] = {
    Need.SAMPLED: (Field.SAMPLED,),
    Need.STUDENT_TOP_K: (Field.STUDENT_TOP_IDS, Field.STUDENT_TOP),
    Need.TEACHER_TOP_K: (Field.TEACHER_TOP_IDS, Field.TEACHER_TOP),
    Need.ENTROPY: (Field.ENTROPY,),
    Need.FULL: (Field.HIDDEN,),
    Need.WRITTEN: (Field.WRITTEN,),
    Need.STUDENT_ENTROPY: (Field.STUDENT_ENTROPY,),
    Need.CHUNKS: (Field.CHUNK_TEACHER, Field.CHUNK_STUDENT, Field.CHUNK_TOKENS),
}  # what the signal holds at every token of a response for each need

Signal = Mapping[Field, torch.Tensor]


def require(signal: Signal, key: Field) -> torch.Tensor:
    """The tensor under `key`. A missing teacher score is an error, never a zero."""
    if key not in signal:
        raise KeyError(f"the teacher signal lacks {key.value!r}; it holds {sorted(k.value for k in signal)}")
    return signal[key]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data set, rendered and tokenised."""

    index: int
    token_ids: Sequence[int]
    answer: str | None = None
    teacher: int = 0  # which of the run's teachers it goes to
    # The same for a teacher with another tokenizer, in its tokens and by its template.
    teacher_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One rollout to be written. All ranks hold the same list of requests for a step.

    `id` is unique in a run and names the rollout in sampling, in the audit group and in the threshold's queue, so that
    none of them depends on the rank or slot that happens to write it.
    """

    id: int
    prompt: Prompt
    max_new_tokens: int
    audit: bool = False


class Cut(NamedTuple):
    """Verdict of a stop rule: keep the first `kept` response tokens; it was known once `at` tokens were written.

    `reason` is one of the rule's `reasons`: who cut.
    """

    kept: int
    at: int
    reason: str


@dataclass(slots=True)
class Rollout:
    """A finished rollout: the prompt, what the teacher wrote after it (`prefix`, empty unless a behaviour policy asks for it), and what
    the student wrote after that, the response. All lengths and cuts are of the response.

    `response_ids` holds what was written up to the end of the response (end token included) or, where a rule ended it,
    up to `cut.at`. The loss reads the first `kept` tokens. An audit rollout runs to its natural end; `cut` then
    says what the rule would have done, and `kept` follows it, so that the loss is the same with and without the audit.
    """

    request: RolloutRequest
    response_ids: list[int]
    kept: int
    reason: str  # EOS, LENGTH, or that of the cut that ended it
    cut: Cut | None = None
    divergences: list[float] = field(default_factory=list)
    hole: tuple[int, int] | None = None  # response tokens [from, to) that the loss leaves out although they are kept
    prefix: tuple[int, ...] = ()
    guided: bool = False  # whether the signal has rows for the prefix, before those of the response

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def full_ids(self) -> list[int]:
        """All that follows the prompt: what a grader reads."""
        return [*self.prefix, *self.response_ids]

    @property
    def prefix_rows(self) -> int:
        """Rows of the signal that belong to the prefix."""
        return len(self.prefix) if self.guided else 0

    @property
    def rows(self) -> int:
        """Rows of the signal."""
        return self.prefix_rows + self.kept

    @property
    def row_ids(self) -> list[int]:
        """The token of each row."""
        return [*(self.prefix if self.guided else ()), *self.response_ids[: self.kept]]

    @property
    def terminated(self) -> bool:
        """Whether a stop rule, not the student, ended the rollout."""
        return self.reason not in (EOS, LENGTH)


@dataclass(slots=True)
class RolloutBatch:
    """The rollouts that one rank holds, with the teacher's signal for their kept tokens laid end to end.

    `signal[key]` has sum(r.rows for r in rollouts) rows, in the order of `rollouts`.
    """

    rollouts: list[Rollout]
    signal: dict[Field, torch.Tensor]
