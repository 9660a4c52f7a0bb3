"""REOPOLD (arXiv 2603.11137): the log-ratio as a reward that is taken with care, first from the safe tokens, then from the open ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.collective import Collective
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.highest import highest
from katds.core.objectives.rows import advantages, outside_holes, rows_of
from katds.core.objectives.sampled import Clip, SampledSettings, read_sampled
from katds.core.types import Field, Need, RolloutBatch, Signal
from katds.settings import Nucleus, Share


class ReopoldSettings(SampledSettings):
    """Sampled reverse KL with a floor: first without the tokens below it, then on the most uncertain ones (arXiv 2603.11137)."""

    kind: Literal["reopold"] = "reopold"
    reads_the_writer: ClassVar[bool] = True
    mixture: Annotated[float, Setting(gt=0, lt=1)] = Setting(
        0.3, description="lambda: rewards are floored at log(lambda) / (1 - lambda), -1.72 for 0.3 [nats]"
    )
    switch: Share = Setting(
        0.5, description="share of the run's steps in the first phase, the paper's T_switch; not published"
    )
    entropy_share: Nucleus = Setting(
        0.2,
        description="share of a step's tokens that the second phase learns from: those of the highest student entropy",
    )
    below_floor: Literal["clip", "mask"] = Setting(
        "clip",
        description="what the second phase makes of tokens below the floor: their reward is clipped there, or they are masked, as in the "
        "first, and the share is of the others; not published",
    )


class Reopold(Objective):
    """Clipped policy gradient of R_t = max(log q(y_t) - log p(y_t), log(lambda) / (1 - lambda)), p as written.

    First phase: tokens below the floor are left out. Second phase: the 20% of the step's tokens with the highest entropy of
    the student, as it wrote them, are learnt from; over all ranks, exactly. The learner divides by the number of tokens that are left.

    Open, and settings here: the switch, by default at half of the run (the paper's T_switch); tokens below the floor in the second
    phase, by default with the floor as their reward; the clip, by default DAPO's (0.2, 0.28). Ties at the edge of the 20% all stay in:
    which of them would go must not depend on the ranks. Tokens in a hole of their rollout are not among those that the 20% are taken of,
    as they are in no loss.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = ReopoldSettings
    needs = frozenset({Need.SAMPLED, Need.WRITTEN, Need.STUDENT_ENTROPY})

    def __init__(
        self, mixture: float, switch: float, entropy_share: float, clip: Clip, leaves_out: bool = False
    ) -> None:
        self._floor = math.log(mixture) / (1.0 - mixture)
        self._switch, self._entropy_share, self._clip = switch, entropy_share, clip
        self._leaves_out = leaves_out
        self._learned_share: float | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        clip = Clip(settings.clip_low, settings.clip_high)
        leaves_out = settings.below_floor == "mask"
        return cls(settings.mixture, settings.switch, settings.entropy_share, clip, leaves_out)

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective: LEARNED, [T]. One sum of two counts in the first phase, of one and four of 256 in the second."""
        reward_T, entropy_T = advantages(batch), rows_of(batch, Field.STUDENT_ENTROPY)
        open_T = outside_holes(batch.rollouts).to(reward_T.device)
        if progress.step < self._switch * progress.steps:
            learned_T = open_T & (reward_T >= self._floor)
            counts = torch.stack([learned_T.sum(), open_T.sum()]).cpu()
            taken, total = collective.sum(counts).tolist()
        else:
            total = int(collective.sum(open_T.sum().reshape(1).cpu()))
            if self._leaves_out:
                open_T &= reward_T >= self._floor
            chosen_N, taken, _ = highest(entropy_T[open_T], self._entropy_share, collective)
            learned_T = open_T.masked_scatter(open_T, chosen_N)
        self._learned_share = taken / total if total else None
        return {Field.LEARNED: learned_T}

    def metrics(self) -> Mapping[str, float]:
        """`learned_share` of the step's tokens."""
        return {} if self._learned_share is None else {"learned_share": self._learned_share}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates), "entropy" (of the student), all of the learnt tokens}; see `Objective.tile`."""
        tokens = read_sampled(logprobs_TV, actions_T, signal)
        reward_T = (tokens.teacher - tokens.written).clamp(min=self._floor)
        return tokens.sums(tokens.losses(reward_T, self._clip), logprobs_TV)
