"""Simulated steps on few to many ranks, with the lengths of recorded runs: several draws of each, since one alone is down to luck."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from katds.plan.advise import shortfalls
from katds.plan.hardware import Profile
from katds.plan.job import Job
from katds.plan.lengths import Lengths
from katds.plan.memory import memory
from katds.plan.refusal import refusal
from katds.plan.simulate import simulate
from katds.plan.step_time import StepTime

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Draws at each size: as many as have so many rollouts together, within these bounds. What many rollouts share varies less.
ROLLOUTS, FEWEST, MOST = 16_384, 3, 16


@dataclass(frozen=True)
class Scenario:
    """Simulated steps on so many ranks, of `rollouts` each; `name` says which lengths, `fits` whether there is memory for them."""

    name: str
    ranks: int
    rollouts: int
    times: Sequence[StepTime]
    fits: bool

    @property
    def seconds(self) -> list[float]:
        """Of each draw."""
        return [time.total for time in self.times]

    @property
    def total(self) -> float:
        """Seconds, in the mean."""
        return statistics.fmean(self.seconds)

    @property
    def waiting(self) -> float:
        """Share of a step, in the mean."""
        return statistics.fmean(time.waiting / time.total for time in self.times)

    def as_json(self) -> dict[str, Any]:
        phases = list(dict.fromkeys(phase for time in self.times for phase in time.seconds))
        return {
            "lengths": self.name, "ranks": self.ranks, "rollouts": self.rollouts, "draws": self.seconds,
            "total": self.total, "waiting": self.waiting, "fits": self.fits,
            "seconds": {p: statistics.fmean(time.seconds.get(p, 0.0) for time in self.times) for p in phases},
        }  # fmt: skip


def scenarios(
    job: Job, profile: Profile, lengths: Mapping[str, Lengths], scales: Sequence[int], weak: bool
) -> list[Scenario]:
    """`weak`: as many rollouts per rank as the job's at every size; else the job's step is shared by all. Sizes that the recipe cannot run
    on (`katds.plan.refusal`) are left out. Deterministic."""
    return [
        _scenario(job, profile, name, each, ranks, weak)
        for ranks in scales
        if refusal(job.on(ranks)) is None
        for name, each in lengths.items()
    ]


def _scenario(job: Job, profile: Profile, name: str, lengths: Lengths, ranks: int, weak: bool) -> Scenario:
    count = job.rollouts * ranks if weak else job.per_step
    prompts = -(-count // job.recipe.rollout.samples_per_prompt)
    other = job.on(ranks).with_settings("rollout", prompts_per_step=prompts)
    draws = min(MOST, max(FEWEST, ROLLOUTS // other.per_step))
    times = [simulate(other, profile, *other.draw(lengths, seed=ranks * MOST + i)) for i in range(draws)]
    fits = not shortfalls(other, memory(other), profile)
    return Scenario(name, ranks, other.per_step, times, fits)


def ratios(longer: Scenario, shorter: Scenario) -> list[float]:
    """Of each draw."""
    return [a / b for a, b in zip(longer.seconds, shorter.seconds, strict=True)]
