"""What all objectives share: reading the teacher's signal row by row, and the sums they report."""

from __future__ import annotations

import torch

from katds.core.divergences import entropy, top_k_tail_forward_kl
from katds.core.types import Field, Signal, require


def aligned(signal: Signal, key: Field, logprobs_TV: torch.Tensor) -> torch.Tensor:
    """The tensor under `key`, with one row per row of the tile.

    gather and broadcasting accept too few rows silently; a token would then be trained on another token's teacher.

    Raises:
        KeyError: the signal lacks `key`.
        ValueError: the number of rows differs.
    """
    tensor = require(signal, key)
    if tensor.shape[0] != logprobs_TV.shape[0]:
        raise ValueError(
            f"the teacher signal {key.value!r} has {tensor.shape[0]} rows for {logprobs_TV.shape[0]} tokens"
        )
    return tensor


def gathered(logprobs_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """logprobs[t, ids[t, k]], [T, K]; ids of any integer type."""
    return logprobs_TV.gather(-1, ids_TK.long())


def teacher_top_forward_kl(logprobs_TV: torch.Tensor, signal: Signal) -> torch.Tensor:
    """KL(q || p) on the teacher's top K and a bucket with the rest of both, [T] nats. The sum over the top K alone would be biased and
    shrink the mass there; none of the objectives has it."""
    ids_TK = aligned(signal, Field.TEACHER_TOP_IDS, logprobs_TV)
    teacher_TK = aligned(signal, Field.TEACHER_TOP, logprobs_TV)
    return top_k_tail_forward_kl(gathered(logprobs_TV, ids_TK), teacher_TK)


def sums(divergence_T: torch.Tensor, logprobs_TV: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"loss", "kl" (its value), "entropy" (the student's)} of an objective that is a divergence."""
    loss = divergence_T.sum()
    return {"loss": loss, "kl": loss.detach(), "entropy": student_entropy(logprobs_TV)}


def student_entropy(logprobs_TV: torch.Tensor) -> torch.Tensor:
    """Detached sum over tokens [nats]; two passes over the tile, small against the head's products."""
    return entropy(logprobs_TV.detach()).sum()
