"""TrOPD (arXiv 2606.01249): the sampled reward only where the teacher could have sampled the token as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.collective import Collective
from katds.core.counter import key, uniforms
from katds.core.objectives.aligned import aligned, teacher_top_forward_kl
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.rows import advantages, outside_holes
from katds.core.objectives.sampled import Clip, RewardSettings, Sampled, read_sampled
from katds.core.types import Field, Need, RolloutBatch, Signal
from katds.settings import Scale

OUTLIERS = ("forward_kl", "mask", "clip", "leave_out")
# The sampler draws a token from the hash of (seed, step, id, position). With the same number, whether a token is trusted would
# follow from which token it is.
_TRUST = 1


class TropdSettings(RewardSettings):
    """Sampled reverse KL on trusted tokens, something milder on the others (arXiv 2606.01249)."""

    kind: Literal["tropd"] = "tropd"
    reads_the_writer: ClassVar[bool] = True
    outliers: Literal["forward_kl", "mask", "clip", "leave_out"] = Setting(
        "forward_kl",
        description="tokens that are not trusted: forward KL on the teacher's top 64 (published best); mask: nothing; a floor for the "
        "reward; leave_out: mask, and no part in the number of tokens that the loss is divided by (which of the two is not published)",
    )
    reward_floor: Annotated[float, Setting(le=0)] = Setting(
        -1.72, description="smallest reward [nats] with outliers: clip; not published, default as in REOPOLD"
    )
    guidance: Scale = Setting(
        0.001,
        description="beta: weight of the mean forward KL, on the teacher's top 64, of the tokens that it wrote itself, with behaviour.kind "
        "teacher_prefix; beside the mean loss of the student's tokens. 0 leaves them out",
    )
    guidance_over: Literal["teacher_tokens", "student_tokens"] = Setting(
        "teacher_tokens",
        description="the number that the sum of this forward KL is divided by: the step's tokens of the teacher, a mean of its own, or "
        "those of the student, as all other losses; not published",
    )


class Tropd(Objective):
    """Trust M_t ~ Bernoulli(min(q(y_t) / p(y_t), 1)), p as written: the share of trusted tokens is 1 - TV(p, q) on average.

    M = 1: the clipped policy gradient of r_t = log q(y_t) - log p(y_t). M = 0, by `outliers`: KL(q_t || p_t) on the teacher's top 64 and
    a bucket with the rest of both (the sum over the top 64 alone is refused: it is biased and shrinks the mass there); nothing; the
    policy gradient of max(r_t, floor); or left out of loss and count.

    Off-policy guidance: on the tokens of prefixes that the teacher wrote (behaviour `teacher_prefix`), KL(q_t || p_t) on the teacher's top
    64 and the bucket, and nothing else: no reward, no trust, no part in the reported scalars. A step's loss is the mean over the student's
    N tokens that are counted plus beta times the mean over the teacher's G tokens of that step, on all ranks (by default: `guidance_over`).

    Open, and settings: the floor; the clip, by default DAPO's (0.2, 0.28); whether p in r_t is the present student's (default) or the one's
    that wrote; whether masked tokens count as tokens that the sum of losses is divided by (mask: a trusted token weighs the same however
    many others are not) or not (leave_out); and what the guidance's sum is divided by. By default a mean of its own: the loss on the
    student's own tokens is what it is without guidance, and beta weighs one mean against another, whatever part of
    the rollouts the teacher wrote. In the first steps this may be nearly all (G/N in the thousands): the student's mean is then over few
    tokens, and noisy. The learner divides by N, so a guided row has the weight beta N / G, or beta with `guidance_over: student_tokens`;
    with several minibatches N and G
    are still the step's, so that beta holds for their mean and in each as far as it has its share of both.

    Raises:
        ValueError: an unknown treatment of outliers.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = TropdSettings
    teacher_top_k = 64

    def __init__(
        self,
        outliers: str,
        floor: float,
        clip: Clip,
        guidance: float = 0.0,
        own_mean: bool = True,
        reward_of: str = "present",
    ) -> None:
        if outliers not in OUTLIERS:
            raise ValueError(f"objective.outliers is {outliers!r}; choose one of {', '.join(OUTLIERS)}")
        self._outliers, self._floor, self._clip, self._reward_of = outliers, floor, clip, reward_of
        self._guidance, self._own_mean = guidance, own_mean
        self._learned_share: float | None = None
        self.reads_prefix = guidance > 0  # type: ignore[misc]
        sampled = frozenset({Need.SAMPLED, Need.WRITTEN})
        self.needs = sampled | {Need.TEACHER_TOP_K} if outliers == "forward_kl" else sampled

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        clip = Clip(settings.clip_low, settings.clip_high)
        own_mean = settings.guidance_over == "teacher_tokens"
        return cls(settings.outliers, settings.reward_floor, clip, settings.guidance, own_mean, settings.reward_of)

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective: TRUSTED, [T], by draws that are hashes of seed, step, rollout and position in the response; LEARNED where the others
        are left out; and where the step has guided rows WEIGHT, [T], theirs, and 1 elsewhere. One sum, with guidance or `leave_out`."""
        ratio_T = advantages(batch).exp()
        rows = torch.tensor([rollout.rows for rollout in batch.rollouts], dtype=torch.int64)
        names = [key(progress.seed, progress.step, rollout.id, _TRUST) for rollout in batch.rollouts]
        keys_T = torch.tensor(names, dtype=torch.int64).repeat_interleave(rows)
        spans = [torch.arange(-rollout.prefix_rows, rollout.kept) for rollout in batch.rollouts]
        trusted_T = uniforms(keys_T, torch.cat([torch.arange(0), *spans])).to(ratio_T.device) < ratio_T
        left_out = self._outliers == "leave_out"
        if not (self.reads_prefix or left_out):
            return {Field.TRUSTED: trusted_T}
        guided_T = batch.signal.get(Field.GUIDED, torch.zeros_like(trusted_T))
        trusted_T = trusted_T & ~guided_T
        own_T = outside_holes(batch.rollouts).to(guided_T.device) & ~guided_T
        counted_T = own_T & trusted_T if left_out else own_T
        sums = torch.stack([counted_T.sum(), own_T.sum(), guided_T.sum()]).cpu()
        counted, own, guided = collective.sum(sums).tolist()
        made = {Field.TRUSTED: trusted_T}
        if left_out:
            made[Field.LEARNED] = trusted_T | guided_T
            self._learned_share = counted / own if own else None
        if guided:
            weight = self._guidance * counted / guided if self._own_mean else self._guidance
            made[Field.WEIGHT] = torch.ones(guided_T.shape, device=guided_T.device).masked_fill(guided_T, weight)
        return made

    def metrics(self) -> Mapping[str, float]:
        """With `leave_out` `learned_share`: trusted ones among the step's tokens of the student."""
        return {} if self._learned_share is None else {"learned_share": self._learned_share}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates), "entropy" (of the student), "trusted" (tokens)}, all of the learnt tokens; see `Objective.tile`."""
        tokens = read_sampled(logprobs_TV, actions_T, signal)
        trusted_T = aligned(signal, Field.TRUSTED, logprobs_TV)
        if Field.WEIGHT in signal:
            return self._guided_tile(logprobs_TV, tokens, trusted_T, signal)
        losses_T = self._rewards(tokens, trusted_T)
        if self._outliers == "forward_kl":
            losses_T = losses_T + torch.where(trusted_T, 0.0, teacher_top_forward_kl(logprobs_TV, signal))
        return tokens.sums(losses_T, logprobs_TV, trusted=trusted_T)

    def _rewards(self, tokens: Sampled, trusted_T: torch.Tensor) -> torch.Tensor:
        """Losses [T] of the rewards."""
        reward_T = tokens.reward_of(self._reward_of)
        outlier = reward_T.clamp(min=self._floor) if self._outliers == "clip" else 0.0
        # The reward is replaced, not the loss: one of -inf would leave a nan in the gradient.
        return tokens.losses(torch.where(trusted_T, reward_T, outlier), self._clip)

    def _guided_tile(
        self, logprobs_TV: torch.Tensor, tokens: Sampled, trusted_T: torch.Tensor, signal: Signal
    ) -> dict[str, torch.Tensor]:
        """Where a teacher's own tokens lie among the student's."""
        guided_T = aligned(signal, Field.GUIDED, logprobs_TV)
        tokens = tokens.without(guided_T)
        forward_T = guided_T | ~trusted_T if self._outliers == "forward_kl" else guided_T
        divergence_T = teacher_top_forward_kl(logprobs_TV, signal, forward_T)
        losses_T = self._rewards(tokens, trusted_T)
        losses_T = losses_T + aligned(signal, Field.WEIGHT, logprobs_TV) * divergence_T
        return tokens.sums(losses_T, logprobs_TV, guided_T, trusted=trusted_T)
