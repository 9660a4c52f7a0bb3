"""Forward KL(q || p): covers the teacher's modes; with GKD (arXiv 2306.13649) the loss of beta = 0."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.divergences import forward_kl
from katds.core.objectives.aligned import aligned, sums, teacher_top_forward_kl
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.types import Field, Need, Signal

SUPPORTS = {
    "teacher_top_k": frozenset({Need.TEACHER_TOP_K}),
    "full": frozenset({Need.FULL}),
}


class ForwardKlSettings(ObjectiveSettings):
    """KL(teacher || student) at every kept token."""

    kind: Literal["forward_kl"] = "forward_kl"
    support: Literal["teacher_top_k", "full"] = Setting(
        "teacher_top_k", description="teacher's top K plus a tail bucket, or the whole vocabulary"
    )


class ForwardKl(Objective):
    """sum_t KL(q_t || p_t), differentiated through p: over the teacher's top K plus a tail bucket, or the vocabulary.

    Source: GKD (arXiv 2306.13649), its loss with beta 0, which is over the whole vocabulary there.

    Raises:
        ValueError: an unknown support.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = ForwardKlSettings

    def __init__(self, support: str) -> None:
        if support not in SUPPORTS:
            raise ValueError(
                f"objective.support is {support!r}; choose one of {sorted(SUPPORTS)}. The student's top k is not "
                "offered: forward KL has its weight where the teacher has its mass. Nor is a top-k sum without the "
                "tail bucket: it is biased."
            )
        self.support = support
        self.needs = SUPPORTS[support]

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.support)

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (its value), "entropy" (of the student)}; see `Objective.tile`."""
        if self.support == "full":
            divergence_T = forward_kl(logprobs_TV, aligned(signal, Field.TEACHER_LOGPROBS, logprobs_TV))
        else:
            divergence_T = teacher_top_forward_kl(logprobs_TV, signal)
        return sums(divergence_T, logprobs_TV)
