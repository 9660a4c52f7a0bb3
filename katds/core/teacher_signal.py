"""What the teacher reports about one tile of tokens: exactly what was asked for, nothing that must be scored twice."""

from __future__ import annotations

from collections.abc import Set

import torch

from katds.core.divergences import entropy
from katds.core.types import Field, Need


def score_tile(
    logprobs_TV: torch.Tensor,
    actions_T: torch.Tensor,
    student_top_ids_TK: torch.Tensor | None,
    needs: Set[Need],
    teacher_top_k: int,
) -> dict[Field, torch.Tensor]:
    """The part of the teacher signal that the full log-probabilities are needed for.

    Args:
        logprobs_TV: the teacher's log-softmax at the rollout temperature.
        actions_T: sampled token ids, any integer type.
        student_top_ids_TK: the student's K most probable tokens; read for `Need.STUDENT_TOP_K` only.
        needs: `Need.FULL` makes nothing here: the caller keeps hidden states.
        teacher_top_k: how many tokens `Need.TEACHER_TOP_K` reports; the vocabulary size where that is smaller.

    Returns:
        SAMPLED [T], STUDENT_TOP [T, K] (its ids stay with the caller), TEACHER_TOP_IDS int32 and TEACHER_TOP
        [T, K] in falling order, ENTROPY [T] nats; those of them that `needs` names.

    Raises:
        ValueError: a need that the arguments cannot serve, or a different number of rows.
    """
    signal: dict[Field, torch.Tensor] = {}
    if Need.SAMPLED in needs:
        signal[Field.SAMPLED] = _at(logprobs_TV, actions_T.unsqueeze(-1)).squeeze(-1)
    if Need.STUDENT_TOP_K in needs:
        if student_top_ids_TK is None:
            raise ValueError("the student's top ids are missing: they are written with the rollout, hand them on")
        signal[Field.STUDENT_TOP] = _at(logprobs_TV, student_top_ids_TK)
    if Need.TEACHER_TOP_K in needs:
        if teacher_top_k < 1:
            raise ValueError(f"teacher_top_k is {teacher_top_k}; at least 1 is needed")
        top = logprobs_TV.topk(min(teacher_top_k, logprobs_TV.shape[-1]), dim=-1)
        signal[Field.TEACHER_TOP] = top.values
        signal[Field.TEACHER_TOP_IDS] = top.indices.to(torch.int32)
    if Need.ENTROPY in needs:
        signal[Field.ENTROPY] = entropy(logprobs_TV)
    return signal


def _at(logprobs_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    # gather takes too few rows without a word.
    if ids_TK.shape[0] != logprobs_TV.shape[0]:
        raise ValueError(f"{ids_TK.shape[0]} rows of token ids for {logprobs_TV.shape[0]} rows of log-probabilities")
    return logprobs_TV.gather(-1, ids_TK.long())
