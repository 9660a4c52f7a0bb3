"""TrOPD (arXiv 2606.01249): the sampled reward only where the teacher could have sampled the token as well."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.collective import Collective
from katds.core.counter import key, uniforms
from katds.core.objectives.aligned import aligned, teacher_top_forward_kl
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.rows import advantages
from katds.core.objectives.sampled import Clip, SampledSettings, read_sampled
from katds.core.types import Field, Need, RolloutBatch, Signal

OUTLIERS = ("forward_kl", "mask", "clip")
# The sampler draws a token from the hash of (seed, step, id, position). With the same number, whether a token is trusted would
# follow from which token it is.
_TRUST = 1


class TropdSettings(SampledSettings):
    """Sampled reverse KL on trusted tokens, something milder on the others (arXiv 2606.01249)."""

    kind: Literal["tropd"] = "tropd"
    reads_the_writer: ClassVar[bool] = True
    outliers: Literal["forward_kl", "mask", "clip"] = Setting(
        "forward_kl",
        description="tokens that are not trusted: forward KL on the teacher's top 64 (published best), nothing, or a floor for the reward",
    )
    reward_floor: Annotated[float, Setting(le=0)] = Setting(
        -1.72, description="smallest reward [nats] with outliers: clip; not published, default as in REOPOLD"
    )


class Tropd(Objective):
    """Trust M_t ~ Bernoulli(min(q(y_t) / p(y_t), 1)), p as written: the share of trusted tokens is 1 - TV(p, q) on average.

    M = 1: the clipped policy gradient of r_t = log q(y_t) - log p(y_t). M = 0, by `outliers`: KL(q_t || p_t) on the teacher's top 64 and
    a bucket with the rest of both (the sum over the top 64 alone is refused: it is biased and shrinks the mass there); nothing; or the
    policy gradient of max(r_t, floor).

    Open, and chosen here: the floor; masked tokens still count as tokens that the sum of losses is divided by; the updates of a step
    after the first use PPO's ratio with DAPO's clip (0.2, 0.28). The guidance by prefixes that the teacher writes is not part of this
    objective.

    Raises:
        ValueError: an unknown treatment of outliers.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = TropdSettings
    teacher_top_k = 64

    def __init__(self, outliers: str, floor: float, clip: Clip) -> None:
        if outliers not in OUTLIERS:
            raise ValueError(f"objective.outliers is {outliers!r}; choose one of {', '.join(OUTLIERS)}")
        self._outliers, self._floor, self._clip = outliers, floor, clip
        sampled = frozenset({Need.SAMPLED, Need.WRITTEN})
        self.needs = sampled | {Need.TEACHER_TOP_K} if outliers == "forward_kl" else sampled

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.outliers, settings.reward_floor, Clip(settings.clip_low, settings.clip_high))

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """TRUSTED, [T]. Communicates nothing: a draw is a hash of seed, step, rollout and position."""
        ratio_T = advantages(batch).exp()
        kept = torch.tensor([rollout.kept for rollout in batch.rollouts], dtype=torch.int64)
        names = [key(progress.seed, progress.step, rollout.id, _TRUST) for rollout in batch.rollouts]
        keys_T = torch.tensor(names, dtype=torch.int64).repeat_interleave(kept)
        positions_T = torch.cat([torch.arange(0), *(torch.arange(rollout.kept) for rollout in batch.rollouts)])
        return {Field.TRUSTED: uniforms(keys_T, positions_T).to(ratio_T.device) < ratio_T}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates), "entropy" (of the student), "trusted" (tokens)}; see `Objective.tile`."""
        tokens = read_sampled(logprobs_TV, actions_T, signal)
        trusted_T = aligned(signal, Field.TRUSTED, logprobs_TV)
        reward_T = tokens.reward
        outlier = reward_T.clamp(min=self._floor) if self._outliers == "clip" else 0.0
        # The reward is replaced, not the loss: one of -inf would leave a nan in the gradient.
        losses_T = tokens.losses(torch.where(trusted_T, reward_T, outlier), self._clip)
        if self._outliers == "forward_kl":
            losses_T = losses_T + torch.where(trusted_T, 0.0, teacher_top_forward_kl(logprobs_TV, signal))
        return tokens.sums(losses_T, logprobs_TV, trusted=trusted_T)
