"""EOPD (arXiv 2603.07079): sampled reverse KL, and forward KL as well where the teacher is undecided."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.objectives.aligned import aligned, teacher_top_forward_kl
from katds.core.objectives.base import Objective, ObjectiveSettings
from katds.core.objectives.sampled import Clip, RewardSettings, read_sampled
from katds.core.types import Field, Need, Signal
from katds.settings import Scale


class EopdSettings(RewardSettings):
    """Sampled reverse KL, plus forward KL on the teacher's top 16 where its entropy is high (arXiv 2603.07079)."""

    kind: Literal["eopd"] = "eopd"
    entropy_gate: Scale = Setting(
        0.8, description="forward KL is added where the teacher's entropy is above this [nats]"
    )
    forward_weight: Scale = Setting(1.0, description="weight of that forward KL; not published")


class Eopd(Objective):
    """sum_t L_t + c 1[H(q_t) > 0.8] KL(q_t || p_t), L_t the clipped policy gradient of r_t = log q(y_t) - log p(y_t).

    The forward KL is on the teacher's top 16 and a bucket with the rest of both;
    the sum over the top 16 alone is refused, as it is biased and shrinks the mass there. Open, and settings here: the clip, by default
    DAPO's (0.2, 0.28), the coefficient c between the two terms, by default 1, and whether p in r_t is the present student's (default) or
    the one's that wrote.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = EopdSettings
    needs = frozenset({Need.SAMPLED, Need.WRITTEN, Need.ENTROPY, Need.TEACHER_TOP_K})
    teacher_top_k = 16

    def __init__(
        self, entropy_gate: float, clip: Clip, forward_weight: float = 1.0, reward_of: str = "present"
    ) -> None:
        self._gate, self._clip, self._forward_weight, self._reward_of = entropy_gate, clip, forward_weight, reward_of

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        clip = Clip(settings.clip_low, settings.clip_high)
        return cls(settings.entropy_gate, clip, settings.forward_weight, settings.reward_of)

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates), "entropy" (of the student), "undecided" (tokens with forward KL)}; see `Objective.tile`."""
        tokens = read_sampled(logprobs_TV, actions_T, signal)
        undecided_T = aligned(signal, Field.ENTROPY, logprobs_TV) > self._gate
        forward_T = self._forward_weight * teacher_top_forward_kl(logprobs_TV, signal)
        losses_T = tokens.losses(tokens.reward_of(self._reward_of), self._clip) + torch.where(
            undecided_T, forward_T, 0.0
        )
        return tokens.sums(losses_T, logprobs_TV, undecided=undecided_T)
