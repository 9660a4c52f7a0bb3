"""Reverse KL(p || q): the loss of on-policy distillation (KAT, arXiv 2606.09471)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.divergences import reverse_kl, top_k_tail_reverse_kl
from katds.core.objectives.aligned import aligned, gathered, sums
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.types import Field, Need, Signal

SUPPORTS = {
    "student_top_k": frozenset({Need.STUDENT_TOP_K}),
    "teacher_top_k": frozenset({Need.TEACHER_TOP_K}),
    "full": frozenset({Need.FULL}),
}
_TOP = {
    "student_top_k": (Field.STUDENT_TOP_IDS, Field.STUDENT_TOP),
    "teacher_top_k": (Field.TEACHER_TOP_IDS, Field.TEACHER_TOP),
}


class ReverseKlSettings(ObjectiveSettings):
    """KL(student || teacher) at every kept token."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    support: Literal["student_top_k", "teacher_top_k", "full"] = Setting(
        "student_top_k",
        description="where it is computed: on the top K (rollout.divergence_top_k) of one of the two, plus a tail bucket (published; "
        "whose is not published), or on the whole vocabulary (exact)",
    )


class ReverseKl(Objective):
    """sum_t KL(p_t || q_t), differentiated through p: over the top K of one of them plus a tail bucket, or the vocabulary.

    The student's K tokens are those that were its most probable ones when the rollout was written: p is read at the
    ids in the signal. Open in the paper (whose top 64), and a setting here: reverse KL has its weight where the student has.

    Raises:
        ValueError: an unknown support.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = ReverseKlSettings

    def __init__(self, support: str) -> None:
        if support not in SUPPORTS:
            raise ValueError(
                f"objective.support is {support!r}; choose one of {sorted(SUPPORTS)}. A top-k sum without the tail "
                "bucket is not offered: it is biased and its gradient moves mass out of the top k."
            )
        self.support = support
        self.needs = SUPPORTS[support]

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.support)

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (its value), "entropy" (of the student)}; see `Objective.tile`."""
        if self.support == "full":
            divergence_T = reverse_kl(logprobs_TV, aligned(signal, Field.TEACHER_LOGPROBS, logprobs_TV))
        else:
            ids, scores = _TOP[self.support]
            ids_TK, teacher_TK = aligned(signal, ids, logprobs_TV), aligned(signal, scores, logprobs_TV)
            divergence_T = top_k_tail_reverse_kl(gathered(logprobs_TV, ids_TK), teacher_TK)
        return sums(divergence_T, logprobs_TV)
