"""Which buffers exist at which moment of a step (`katds.plan.items`), and how large they are on the fullest rank.

Not counted: what a process has before it loads anything, prompts and rollouts as Python lists, evaluations, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable

from katds.plan.held import held
from katds.plan.items import Memory
from katds.plan.job import Job
from katds.plan.phases import learning, rollouts


def memory(job: Job, phases: Iterable[str] = ("rollout", "learn")) -> Memory:
    """Of a phase that is not named, what lives in it alone is left out."""
    found = Memory(job.device)
    held(found, job)
    if "rollout" in phases:
        rollouts(found, job)
    if "learn" in phases:
        learning(found, job)
    return found
