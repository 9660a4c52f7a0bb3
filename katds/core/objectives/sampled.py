"""What the objectives on sampled tokens share: their settings and checks, and the three log-probabilities of a sampled token."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field as Setting

from katds.core.divergences import sampled_reverse_kl
from katds.core.objectives.aligned import aligned, gathered, student_entropy
from katds.core.objectives.base import ObjectiveSettings
from katds.core.objectives.clipped import clipped_policy_gradient
from katds.core.types import Field, Signal
from katds.settings import Scale, Share


class SampledSettings(ObjectiveSettings):
    """Base of objectives whose gradient is an expectation over the tokens that the student samples."""

    clip_low: Share = Setting(
        0.2,
        description="probability ratios since writing count down to 1 - clip_low; without effect in a step's first update. "
        "DAPO's bounds; published for cross_tokenizer, not for the other methods",
    )
    clip_high: Scale = Setting(0.28, description="and up to 1 + clip_high")

    # Whether log p at writing enters beyond PPO's ratio: tokens must then come from the student itself.
    reads_the_writer: ClassVar[bool] = False

    def check(self, filtered: bool, minibatches: int, blended: bool = False) -> None:
        kind = type(self).model_fields["kind"].default
        # What is of tokens is no way out where the teacher has others.
        instead = ("", "") if self.aligns_text else (", or take eopd or reverse_kl", ", or take reverse_kl")
        if blended and self.reads_the_writer:
            raise ValueError(
                f"objective.kind {kind} compares the teacher with the student that wrote, but behaviour.kind lets another distribution "
                f"write; set behaviour.kind to student{instead[0]}"
            )
        if filtered:
            raise ValueError(
                f"objective.kind {kind} is biased where rollouts are not drawn from the whole distribution; set "
                f"rollout.top_p to 1, top_k and min_p to 0 and temperature above 0{instead[1]}"
            )


class RewardSettings(SampledSettings):
    """Base of those whose paper does not say of which student the reward is, once it has moved since it wrote."""

    reward_of: Literal["present", "written"] = Setting(
        "present",
        description="whose log p stands in the reward log q(y) - log p(y) from a step's second update on: the present student's, so that "
        "the expected gradient stays that of KL(p || q), or that of the student that wrote, as in PPO's advantages; not published",
    )

    def check(self, filtered: bool, minibatches: int, blended: bool = False) -> None:
        super().check(filtered, minibatches, blended)
        if blended and self.reward_of == "written":
            raise ValueError(
                "objective.reward_of is written, but behaviour.kind lets another distribution write than the student, whose reward that "
                "would be; set objective.reward_of to present"
            )


class Clip(NamedTuple):
    """How far a probability ratio counts below and above 1; see `clipped_policy_gradient`."""

    low: float
    high: float


class Sampled(NamedTuple):
    """log-probabilities of a tile's sampled tokens, [T] each."""

    student: torch.Tensor  # the present one; differentiable
    written: torch.Tensor  # when the token was written
    teacher: torch.Tensor

    @property
    def reward(self) -> torch.Tensor:
        """log q(y) - log p(y), detached. With the present p, so that with the ratio the expected gradient is that of KL(p || q) whoever
        wrote the token."""
        return -sampled_reverse_kl(self.student, self.teacher)

    def reward_of(self, student: str) -> torch.Tensor:
        """The same of the `present` student, or of the one that has `written`; see `RewardSettings`."""
        return self.reward if student == "present" else -sampled_reverse_kl(self.written, self.teacher)

    def without(self, rows_T: torch.Tensor) -> Sampled:
        """With these rows (bool) as if student, writer and teacher agreed on them: reward 0, ratio 1, whatever they hold. Nothing of
        them is left in a loss, a gradient or a sum."""
        own_T = self.student.detach()
        others = (torch.where(rows_T, own_T, each) for each in (self.written, self.teacher))
        return Sampled(self.student, *others)

    def losses(self, advantage_T: torch.Tensor, clip: Clip) -> torch.Tensor:
        """[T]; see `clipped_policy_gradient`."""
        return clipped_policy_gradient(self.student, self.written, advantage_T, clip.low, clip.high)

    def sums(
        self,
        losses_T: torch.Tensor,
        logprobs_TV: torch.Tensor,
        without_T: torch.Tensor | None = None,
        **counted: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (k1 estimates log p - log q of the present student), "entropy" (its, but for the rows `without_T`), and how many
        tokens of each mask}."""
        sums = {"loss": losses_T.sum(), "kl": -self.reward.sum()}
        counts = {name: mask_T.sum().to(losses_T.dtype) for name, mask_T in counted.items()}
        return {**sums, "entropy": student_entropy(logprobs_TV, without_T), **counts}


def read_sampled(logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> Sampled:
    """See `student_and_teacher`."""
    student_T, teacher_T = student_and_teacher(logprobs_TV, actions_T, signal)
    return Sampled(student_T, aligned(signal, Field.WRITTEN, logprobs_TV), teacher_T)


def student_and_teacher(
    logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(y), differentiable, and log q(y), [T] each.

    Raises:
        ValueError: a score per token and vocabulary entry in place of the sampled token's; as an advantage it would not depend on
            the action, and its expected gradient would be zero.
    """
    teacher_T = aligned(signal, Field.SAMPLED, logprobs_TV)
    if teacher_T.shape != actions_T.shape:
        raise ValueError(
            f"a reward per sampled token is needed: shape {tuple(actions_T.shape)}, "
            f"the signal has {tuple(teacher_T.shape)}"
        )
    return gathered(logprobs_TV, actions_T.unsqueeze(-1)).squeeze(-1), teacher_T
