"""Settings of KAT (`katds.core.stop.kat`), what is refused among them, and when they come to nothing."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from katds.core.stop.base import RunFacts, StopSettings
from katds.settings import Count, Positive, Section

Source = Literal["audit", "completed", "all"]
Supervise = Literal["before", "agreement", "after"]
REFILLS = 4  # so often must the audit group fill the queue in a run, or its minima are too old to be a threshold


class ThresholdSettings(Section):
    """KAT's threshold: a quantile of the smallest window divergences of recent rollouts, whichever teacher read them."""

    eta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="the threshold is the 1-eta quantile of recent rollout minima"
    )
    capacity: Positive = Field(4096, description="minima kept (first in, first out)")
    min_entries: Positive = Field(512, description="nothing is terminated before so many minima are known")
    min_steps: Count = Field(50, description="nothing is terminated in the first so many optimizer steps")
    source: Literal["auto", "audit", "completed", "all"] = Field(
        "auto",
        description="whose minima enter, which is not published: the audit group's (unbiased), those of rollouts that ended by themselves "
        "(biased high), all (biased low), of all teachers alike; auto: audit if it refills the queue four times in the run, else completed",
    )


class KatSettings(StopSettings):
    """End a rollout once its windowed divergence stays below an adaptive threshold (arXiv 2606.09471)."""

    kind: Literal["kat"] = "kat"
    window: Positive = Field(64, description="W, tokens per window")
    stride: Positive | None = Field(None, description="tokens between windows; not published; default W/4")
    persistence: Positive = Field(4, description="T, consecutive low windows that end a rollout")
    min_kept: Count | None = Field(None, description="L0, no cut before this token; not published; default 2W")
    support: Literal["student_top_k", "teacher_top_k"] = Field(
        "student_top_k",
        description="whose most probable tokens (rollout.divergence_top_k) the divergence is on, beside a tail bucket; not published. The "
        "student's: where reverse KL has its weight; the teacher's: the student's head is read once more per token. What else reads the "
        "divergence of written tokens, such as topd, reads this one (the loss has objective.support)",
    )
    supervise: Supervise = Field(
        "before",
        description="the loss reads what precedes the trap (published); ablations: agreement adds the trap, and the rollout ends with "
        "it; after reads all but the trap, and nothing is ended",
    )
    threshold: ThresholdSettings = ThresholdSettings()

    @property
    def leaves_hole(self) -> bool:
        return self.supervise == "after"

    @property
    def reads_divergence(self) -> bool:
        return True

    @property
    def reads_teacher_top_k(self) -> bool:
        return self.support == "teacher_top_k"

    @property
    def resolved_stride(self) -> int:
        return self.stride if self.stride is not None else max(1, self.window // 4)

    @property
    def resolved_min_kept(self) -> int:
        return self.min_kept if self.min_kept is not None else 2 * self.window

    def check(self, max_new_tokens: int, temperature: float, audit_fraction: float) -> None:
        stride, min_kept, queue = self.resolved_stride, self.resolved_min_kept, self.threshold
        limit = f"rollout.max_new_tokens {max_new_tokens}"
        if self.window > max_new_tokens:
            raise ValueError(f"stop.window {self.window} is longer than {limit}; lower stop.window")
        if min_kept >= max_new_tokens:
            raise ValueError(f"stop.min_kept {min_kept} leaves nothing to cut below {limit}; lower stop.min_kept")
        # Windows end every `stride` tokens, from the first that may be low; at the very last token a rollout ends by itself.
        later = math.ceil(min_kept / stride) + self.persistence - 1 + (self.supervise == "agreement")
        soonest = self.window + later * stride
        if soonest >= max_new_tokens:
            raise ValueError(
                f"stop.kind kat needs {soonest} tokens to end a rollout (stop.min_kept + stop.window + (stop.persistence - 1) x "
                f"stop.stride, in whole strides), and more than these in {limit}; lower stop.window"
            )
        if audit_fraction == 1 and self.supervise != "after":
            raise ValueError("rollout.audit_fraction is 1: no rollout could be ended; lower it")
        if stride > self.window:
            raise ValueError(
                f"stop.stride {stride} is longer than stop.window {self.window}: tokens would go unseen; "
                "lower stop.stride"
            )
        if queue.min_entries > queue.capacity:
            raise ValueError(
                f"stop.threshold.min_entries {queue.min_entries} is never reached with stop.threshold.capacity "
                f"{queue.capacity}; raise stop.threshold.capacity"
            )
        if audit_fraction == 0 and queue.source == "audit":
            raise ValueError(
                "stop.threshold.source is 'audit' but rollout.audit_fraction is 0; raise rollout.audit_fraction"
            )
        if temperature == 0:
            raise ValueError("rollout.temperature is 0: the divergence of a greedy policy is undefined; set it above 0")

    def choices(self, run: RunFacts) -> list[str]:
        if self.threshold.source != "auto":
            return []
        _, source = warm_up(self, run)
        whose = {"audit": "the audit group", "completed": "rollouts that ended by themselves, which are biased high"}
        return [f"stop.threshold.source auto is {source} in this run: the minima of {whose[source]}"]

    def doubts(self, run: RunFacts) -> list[str]:
        """A threshold that is not known before the last step ends: the run is one without a stop rule."""
        queue = self.threshold
        calls, source = warm_up(self, run)
        # Of all but the last step; the audit group has its even share of them, and every rollout has at most one minimum.
        before = (run.steps - 1) * run.rollouts_per_step
        most = int(before * run.audit_fraction) if source == "audit" else before
        if run.steps > calls and most >= queue.min_entries:
            return []
        verb = "leave no hole in a" if self.leaves_hole else "end no"
        reasons, remedies = [], []
        if run.steps <= calls:
            reasons.append(
                f"stop.threshold.min_steps {queue.min_steps} optimizer steps are not over before the last of {run.steps} steps x "
                f"train.minibatches {run.updates_per_step}"
            )
            remedies.append("stop.threshold.min_steps")
        if most < queue.min_entries:
            of = "of the audit group" if source == "audit" else "at most"
            reasons.append(
                f"stop.threshold.min_entries {queue.min_entries} minima are more than the {most} {of} before the last step"
            )
            remedies.append("stop.threshold.min_entries")
        return [
            f"stop.kind kat will {verb} rollout, as with stop.kind never: {' and '.join(reasons)}; lower {' and '.join(remedies)}, or "
            "train longer"
        ]


def warm_up(settings: KatSettings, run: RunFacts) -> tuple[int, Source]:
    """Steps of the run without a threshold, made of optimizer steps; and the source, `auto` being the audit group where that refills the
    queue often enough."""
    queue = settings.threshold
    audited = run.steps * run.rollouts_per_step * run.audit_fraction
    auto: Source = "audit" if audited >= REFILLS * queue.capacity else "completed"
    return -(-queue.min_steps // run.updates_per_step), auto if queue.source == "auto" else queue.source
