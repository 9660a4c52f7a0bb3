"""Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.divergences import generalised_jsd
from katds.core.objectives.aligned import aligned, sums
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.types import Field, Need, Signal
from katds.settings import Share


class JsdSettings(ObjectiveSettings):
    """Generalised Jensen-Shannon divergence over the whole vocabulary at every kept token."""

    kind: Literal["jsd"] = "jsd"
    beta: Share = Setting(
        0.5, description="0 forward KL, 1 reverse KL (GKD, arXiv 2306.13649); which is best depends on the task"
    )


class Jsd(Objective):
    """sum_t JSD_beta(p_t, q_t) over the whole vocabulary (GKD, arXiv 2306.13649, eq. 1); beta 0 is the forward, 1 the reverse KL.

    JSD_beta(p, q) = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    Raises:
        ValueError: beta outside [0, 1].
    """

    Settings: ClassVar[type[ObjectiveSettings]] = JsdSettings
    needs = frozenset({Need.FULL})

    def __init__(self, beta: float) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"objective.beta is {beta}, outside [0, 1]; 0 is the forward KL, 1 the reverse KL")
        self.beta = beta

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.beta)

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (its value), "entropy" (of the student)}; see `Objective.tile`."""
        teacher_TV = aligned(signal, Field.TEACHER_LOGPROBS, logprobs_TV)
        return sums(generalised_jsd(logprobs_TV, teacher_TV, self.beta), logprobs_TV)
