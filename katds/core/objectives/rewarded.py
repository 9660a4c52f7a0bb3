"""An objective with a task reward on top: the teacher says how to write, the reward what it should lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch

from katds.core.collective import Collective
from katds.core.objectives.aligned import aligned, gathered
from katds.core.objectives.base import Objective, ObjectiveSettings, Progress
from katds.core.objectives.clipped import clipped_policy_gradient
from katds.core.objectives.rows import outside_holes
from katds.core.types import Field, Need, Rollout, RolloutBatch, Signal


class Rewarded(Objective):
    """inner loss + weight x sum_t of PPO's clipped surrogate with the rollout's advantage on each of its tokens.

    The advantage is the reward less the mean reward of the other rollouts of the same prompt, or of the whole step where a prompt has
    one rollout (leave one out: unbiased, RLOO, arXiv 2402.14740). A rollout that a stop rule has ended, or would have ended but for the
    audit, has no outcome: it gets no advantage and is in no mean.

    Tokens that the inner objective leaves out (`Field.LEARNED`) have the reward's term alone. The loss is the mean of the inner one over
    the tokens that it learns from, as without a reward, plus weight x the mean of the reward's over all: the learner divides by all
    tokens, so inner sums are multiplied by the step's ratio of the two counts (with several updates a step: of the whole step).
    The reward is of the whole rollout, whatever the teacher can say about a token.

    No source says how a reward goes with distillation. Chosen: leave one out as the baseline, which needs no second model; no outcome for
    what was ended, as a verdict on half a response would be the rule's; a surrogate of its own beside the objective's, so that one
    reward serves objectives that have no advantage to add it to (after a step's first update this is not the clip of a
    sum of advantages); and the clip, which is DAPO's.

    Args:
        weight: above 0, of the reward's term.
        reward: of a complete rollout, called once per rollout where it was written.
        low, high: how far the probability ratio counts (DAPO's clip-higher, arXiv 2503.14476); without effect in the first update.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings

    def __init__(
        self, inner: Objective, weight: float, reward: Callable[[Rollout], float], low: float = 0.2, high: float = 0.28
    ) -> None:
        assert weight > 0, f"weight {weight} is not above 0"
        self._inner, self._weight, self._reward = inner, weight, reward
        self._low, self._high = low, high
        self.needs = inner.needs | {Need.WRITTEN}
        self.teacher_top_k = inner.teacher_top_k  # type: ignore[misc]
        self.teacher_writes = inner.teacher_writes  # type: ignore[misc]
        self.reads_prefix = inner.reads_prefix  # type: ignore[misc]
        self._mean: float | None = None
        self._ratio = 1.0  # of all tokens to those that the inner objective learns from

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        raise TypeError("made around another objective")

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective: the inner objective's fields, LEARNED as DISTILLED, and REWARD. Gathers three numbers per rollout, and two."""
        made = self._inner.prepare(batch, progress, collective)
        own_tokens = (0, 0)
        if Field.LEARNED in made:
            made[Field.DISTILLED] = made.pop(Field.LEARNED)
            own_tokens = _counts(batch, made[Field.DISTILLED])
        total, distilled = (sum(part) for part in zip(*collective.gather(own_tokens), strict=True))
        self._ratio = total / distilled if distilled else 1.0
        own = [(r.id, r.request.prompt.index, self._reward(r)) for r in batch.rollouts if r.cut is None]
        known = sorted(entry for part in collective.gather(own) for entry in part)
        advantages = leave_one_out(known)
        self._mean = math.fsum(reward for *_, reward in known) / len(known) if known else None
        values = torch.tensor([advantages.get(r.id, 0.0) for r in batch.rollouts], dtype=torch.float32)
        counts = torch.tensor([r.rows for r in batch.rollouts], dtype=torch.int64)
        device = next(iter(batch.signal.values())).device if batch.signal else None
        return {**made, Field.REWARD: values.repeat_interleave(counts).to(device)}

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """The inner objective's sums, of the tokens that it learns from; "loss" with the reward's term."""
        sums = {key: value * self._ratio for key, value in self._distilled(logprobs_TV, actions_T, signal).items()}
        logprobs_T = gathered(logprobs_TV, actions_T.unsqueeze(-1)).squeeze(-1)
        written_T = aligned(signal, Field.WRITTEN, logprobs_TV)
        advantage_T = aligned(signal, Field.REWARD, logprobs_TV)
        if Field.GUIDED in signal:  # the teacher's tokens are not the student's to be rewarded
            guided_T = aligned(signal, Field.GUIDED, logprobs_TV)
            written_T = torch.where(guided_T, logprobs_T.detach(), written_T)
            advantage_T = advantage_T.masked_fill(guided_T, 0.0)
        surrogate_T = clipped_policy_gradient(logprobs_T, written_T, advantage_T, self._low, self._high)
        return {**sums, "loss": sums["loss"] + self._weight * surrogate_T.sum()}

    def _distilled(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """Where the inner objective leaves tokens out: a copy of the tile without them, whose size the host waits for, once per tile."""
        if Field.DISTILLED not in signal:
            return self._inner.tile(logprobs_TV, actions_T, signal)
        rows_N = aligned(signal, Field.DISTILLED, logprobs_TV).nonzero().squeeze(-1)
        part = {key: values[rows_N] for key, values in signal.items()}
        return self._inner.tile(logprobs_TV[rows_N], actions_T[rows_N], part)

    def metrics(self) -> Mapping[str, float]:
        """`reward/mean` of the complete rollouts of the last step."""
        return {**self._inner.metrics(), **({} if self._mean is None else {"reward/mean": self._mean})}


def _counts(batch: RolloutBatch, distilled_T: torch.Tensor) -> tuple[int, int]:
    """Tokens of this rank that the loss is divided by, and how many of them the inner objective learns from."""
    counted = outside_holes(batch.rollouts).to(distilled_T.device)
    if Field.GUIDED in batch.signal:
        counted &= ~batch.signal[Field.GUIDED].to(counted.device)
    return int(counted.sum()), int((counted & distilled_T).sum())


def leave_one_out(known: list[tuple[int, int, float]]) -> dict[int, float]:
    """Rollout id -> advantage, from (id, prompt, reward) in the order of ids. Sums are exactly rounded: the same on any number of ranks."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for rollout_id, prompt, reward in known:
        groups.setdefault(prompt, []).append((rollout_id, reward))
    everyone = [(rollout_id, reward) for rollout_id, _, reward in known]
    advantages = {}
    for group in groups.values():
        peers = group if len(group) > 1 else everyone
        total = math.fsum(reward for _, reward in peers)
        for rollout_id, reward in group:
            others = len(peers) - 1
            advantages[rollout_id] = reward - (total - reward) / others if others else 0.0
    return advantages
