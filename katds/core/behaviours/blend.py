"""Student and teacher write together, within a trust region of the student (TRB, arXiv 2605.31159)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from katds.core.behaviours.base import Behaviour, BehaviourSettings, Mix
from katds.core.schedule import Schedule, progressed
from katds.settings import Rate, Share

HALVINGS = 20  # of the interval of b: its rounding is then that of float32


class BlendSettings(BehaviourSettings):
    """Every token is drawn from mu ~ p^(1-b) q^b, with the b at which KL(mu || p) is the budget (arXiv 2605.31159)."""

    kind: Literal["trb"] = "trb"
    blends: ClassVar[bool] = True
    budget: Rate = Field(0.1, description="KL(mu || p) of a token in the first step [nats]; not published")
    anneal: Share = Field(
        1.0,
        description="share of the run in which the budget falls to 0; afterwards the student writes alone. Not published",
    )
    schedule: Schedule = Field(
        "linear", description="how it falls: by equal steps, or along half a cosine; not published"
    )

    def check(self, greedy: bool) -> None:
        if greedy:
            raise ValueError("rollout.temperature is 0: a greedy policy cannot be blended; set it above 0")


class Blend(Behaviour):
    """mu ~ p^(1-b) q^b with KL(mu || p) = budget, or mu = q where the teacher is nearer than that.

    Open, and settings here: the budget of the first step, and how it falls.

    Args:
        budget: [nats], of step 0.
        steps: in which it falls to 0.

    Cost: a teacher step per token besides the teacher's scoring of the chunk; some 40 passes over [S, V] per token.
    """

    Settings: ClassVar[type[BehaviourSettings]] = BlendSettings

    def __init__(self, budget: float, steps: float, schedule: Schedule = "linear") -> None:
        assert budget > 0 and steps >= 0, f"budget {budget}, steps {steps}"
        self._budget, self._steps, self._schedule = budget, steps, schedule

    @classmethod
    def from_settings(cls, settings: Any, steps: int) -> Self:
        return cls(settings.budget, settings.anneal * steps, settings.schedule)

    def budget(self, step: int) -> float:
        """Of this step [nats]."""
        if step >= self._steps:
            return 0.0
        return self._budget * (1.0 - progressed(step / self._steps, self._schedule))

    def at(self, step: int) -> Mix | None:
        budget = self.budget(step)
        return partial(blend, budget=budget) if budget > 0 else None


def blend(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor, budget: float) -> torch.Tensor:
    """log mu of mu ~ p^(1-b) q^b, [..., V], with the largest b in [0, 1] at which KL(mu || p) <= budget.

    KL(mu_b || p) grows with b: its derivative is b times the variance of log q - log p under mu_b. So b is found by halving, for
    all rows at once and without a look at the values by the host. Tokens that either model rules out (-inf) stay ruled out.
    """
    ratio = q_logprobs - p_logprobs
    possible = p_logprobs.isfinite() & q_logprobs.isfinite()
    ratio = ratio.masked_fill(~possible, 0.0)
    base = p_logprobs.masked_fill(~possible, -torch.inf)

    def mixed(b: torch.Tensor) -> torch.Tensor:
        return (base + b * ratio).log_softmax(-1)

    def divergence(log_mu: torch.Tensor) -> torch.Tensor:
        terms = log_mu.exp() * (log_mu - p_logprobs).masked_fill(~possible, 0.0)
        return terms.sum(-1, keepdim=True)

    low = torch.zeros_like(p_logprobs[..., :1])
    high = torch.ones_like(low)
    whole = divergence(mixed(high)) <= budget
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = divergence(mixed(middle)) <= budget
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return mixed(torch.where(whole, torch.ones_like(low), low))
