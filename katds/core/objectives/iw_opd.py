"""IW-OPD (arXiv 2606.22600): early tokens count more, as the student has not yet left the teacher's paths there."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.collective import Collective
from katds.core.objectives.aligned import aligned
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.rows import advantages
from katds.core.objectives.sampled import Clip, RewardSettings, read_sampled
from katds.core.types import Field, Need, RolloutBatch, Signal
from katds.settings import Scale


class IwOpdSettings(RewardSettings):
    """Sampled reverse KL whose weight falls with the disagreement so far (arXiv 2606.22600)."""

    kind: Literal["iw_opd"] = "iw_opd"
    reads_the_writer: ClassVar[bool] = True
    gain: Scale = Setting(
        0.5, description="g: the first tokens of a rollout weigh up to 1 + g, its last token 1 (by share: inclusive)"
    )
    share: Literal["inclusive", "exclusive"] = Setting(
        "inclusive",
        description="whether a token's own disagreement counts in its share so far: then the last token weighs 1; or else the first weighs "
        "1 + g. Not published",
    )


class IwOpd(Objective):
    """sum_t w_t L_t with the clipped policy gradient L_t of the reward log q(y_t) - log p(y_t), and
    w_t = 1 + g (1 - sum_{s<=t} |A_s| / sum_s |A_s|).

    A_s = log q(y_s) - log p(y_s) with p as written; the sums run over what is kept of the rollout, tokens in its hole (`stop.supervise:
    after`) included: the loss does not read these, but what follows them was written after them. Open, and settings here: whether the share
    includes the token itself, by default so (s <= t; exclusive: s < t), the clip, by default DAPO's (0.2, 0.28), and whether p in the
    reward is the present student's (default) or, as in A_s, the one's that wrote. Losses are divided by the number of tokens, not by their
    weights, as those of every objective: the learner divides.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = IwOpdSettings
    needs = frozenset({Need.SAMPLED, Need.WRITTEN})

    def __init__(self, gain: float, clip: Clip, inclusive: bool = True, reward_of: str = "present") -> None:
        self._gain, self._clip, self._inclusive, self._reward_of = gain, clip, inclusive, reward_of

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        clip = Clip(settings.clip_low, settings.clip_high)
        return cls(settings.gain, clip, settings.share == "inclusive", settings.reward_of)

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """WEIGHT, [T]. Communicates nothing: a weight depends on its rollout only."""
        advantage_T = advantages(batch)
        # On the host, each rollout by itself and in float64: the same bits whatever lies beside it.
        parts = advantage_T.abs().double().cpu().split([rollout.rows for rollout in batch.rollouts])
        weights = [self._weights(part) for part in parts]
        return {Field.WEIGHT: torch.cat([*weights, torch.empty(0)]).to(advantage_T)}

    def _weights(self, size_T: torch.Tensor) -> torch.Tensor:
        so_far_T = size_T.cumsum(0)
        total = so_far_T[-1:]
        if not self._inclusive:
            so_far_T = so_far_T - size_T
        # Where the models agree on every token there is no gradient to weigh.
        return 1.0 + self._gain * (1.0 - so_far_T / torch.where(total > 0, total, 1.0))

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates), "entropy" (of the student)}; see `Objective.tile`."""
        tokens = read_sampled(logprobs_TV, actions_T, signal)
        weight_T = aligned(signal, Field.WEIGHT, logprobs_TV)
        return tokens.sums(weight_T * tokens.losses(tokens.reward_of(self._reward_of), self._clip), logprobs_TV)
