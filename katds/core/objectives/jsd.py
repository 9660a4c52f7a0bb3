"""Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1)."""

from __future__ import annotations

from typing import Protocol

import torch

from katds.core.divergences import generalised_jsd
from katds.core.objectives.aligned import aligned, sums
from katds.core.types import Field, Need, Signal


class Jsd:
    """sum_t JSD_beta(p_t, q_t) over the whole vocabulary; beta 0 is the forward, 1 the reverse KL.

    Raises:
        ValueError: beta outside [0, 1].
    """

    needs = frozenset({Need.FULL})

    def __init__(self, beta: float) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"objective.beta is {beta}, outside [0, 1]; 0 is the forward KL, 1 the reverse KL")
        self.beta = beta

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (its value), "entropy" (of the student)}; see `Objective.tile`."""
        teacher_TV = aligned(signal, Field.TEACHER_LOGPROBS, logprobs_TV)
        return sums(generalised_jsd(logprobs_TV, teacher_TV, self.beta), logprobs_TV)


class Settings(Protocol):
    """The part of the recipe that is read here."""

    @property
    def beta(self) -> float: ...


def build(settings: Settings) -> Jsd:
    return Jsd(settings.beta)
