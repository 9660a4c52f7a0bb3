"""Which rollouts a step asks for, as a pure function of the step: a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from katds.core.types import Prompt, RolloutRequest


class PromptStream(Protocol):
    """An endless, seekable stream of prompts; see `katds.data.prompts.PromptSet`."""

    def batch(self, start: int, count: int) -> list[Prompt]: ...


@dataclass(frozen=True, slots=True)
class RequestStream:
    """`prompts_per_step` prompts a step, `samples` rollouts each; ids count on over the run."""

    prompts: PromptStream
    prompts_per_step: int
    samples: int
    max_new_tokens: int
    audit_fraction: float

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.samples

    def step(self, step: int) -> list[RolloutRequest]:
        """The same list on every rank; neighbours share a prompt."""
        prompts = self.prompts.batch(step * self.prompts_per_step, self.prompts_per_step)
        first = step * self.rollouts_per_step
        return requests_for(prompts, self.samples, self.max_new_tokens, first, self.audit_fraction)


def requests_for(
    prompts: Sequence[Prompt], samples: int, max_new_tokens: int, first_id: int = 0, audit_fraction: float = 0.0
) -> list[RolloutRequest]:
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    return [
        RolloutRequest(i, prompt, max_new_tokens, in_audit(i, audit_fraction))
        for i, prompt in enumerate(repeated, first_id)
    ]


def in_audit(rollout_id: int, fraction: float) -> bool:
    """Membership in the audit group: an even share of the ids, so that every step has its part."""
    return int((rollout_id + 1) * fraction) > int(rollout_id * fraction)
