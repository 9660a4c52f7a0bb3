"""The time of a step, simulated: the engine's own scheduler deals rollouts to slots, the learner's own packer deals them to micro-batches;
what lies between is arithmetic over a device profile.

A forward takes the longer of its operations and of reading its weights and keys. Weights that are gathered for it come meanwhile where
the device overlaps both, else before; so does what offload brings from the host for it. Left out: Python, kernel launches but for
`Profile.token_step`, evaluations, checkpoints.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from katds.core.packing import Plan
from katds.plan import offload, volume
from katds.plan.hardware import Profile
from katds.plan.job import Job
from katds.plan.offload import Link
from katds.plan.rounds import Rollouts, fetched, forward_seconds
from katds.plan.step_time import StepTime
from katds.plan.volume import Flow
from katds.rollout.slots import assign


def learn(job: Job, profile: Profile, kept: Sequence[int], step: StepTime) -> None:
    """Adds the updates of a step to `step`."""
    recipe, ranks = job.recipe.train, job.ranks
    step.move("learn: rollouts", volume.survey(job, len(kept)), profile)
    _teacher_head(job, profile, step)
    gathers = _Gathers(job)
    for first in range(recipe.minibatches):
        taken = [k for k in kept[first :: recipe.minibatches] if k]
        lengths = [round(job.before) + k - 1 for k in taken]
        owners = [i % ranks for i in range(len(lengths))]
        packing = job.packing(lengths, owners)
        step.add("learn", step.move("learn: rollouts", volume.exchange(job, taken, owners, packing), profile))
        _micro_batches(job, profile, packing, lengths, gathers.of(first), step)
        seconds = offload.optimizer_seconds(job, profile)
        seconds += step.copy("learn: weights after an update", offload.weights(job), job, profile)
        step.add("optimizer", seconds)
        flow = volume.after_update(job)
        step.move("learn: small weights after an update", flow, profile)
        step.copy("learn: small weights after an update", _own(job, flow), job, profile)


def _teacher_head(job: Job, profile: Profile, step: StepTime) -> None:
    """Gathered before the first update, and kept until after the last."""
    name, flow = "learn: teacher's head", volume.teacher_head(job)
    seconds = step.move(name, flow, profile)
    seconds += step.copy(name, fetched(job, job.teachers[0], flow), job, profile)
    step.add("learn", seconds)


class _Gathers:
    """Of micro-batches: the first of a step, the first after another update, and all others."""

    def __init__(self, job: Job) -> None:
        self._first = volume.micro_batch_gathers(job, after_view=True)
        self._after = volume.micro_batch_gathers(job, after_view=False, after_step=True)
        self._later = volume.micro_batch_gathers(job, after_view=False)

    def of(self, minibatch: int) -> tuple[list[Flow], list[Flow]]:
        """Of its first micro-batch, and of each other."""
        return (self._after if minibatch else self._first), self._later


def _micro_batches(
    job: Job, profile: Profile, packing: Plan, lengths: Sequence[int], gathers: tuple[list[Flow], list[Flow]], step: StepTime
) -> None:  # fmt: skip
    """Of one minibatch."""
    passes = 4 if job.recipe.train.activation_checkpointing else 3
    reduction = volume.reduction(job)
    for at in range(packing.rounds):
        batches = [[lengths[i] for i in rank[at]] for rank in packing.micro_batches]
        tokens = np.array([max(1.0, sum(batch) / job.sharers) for batch in batches])
        pairs = np.array([sum(n * n / 2 for n in batch) / job.sharers for batch in batches])
        work = float((passes * forward_seconds(job.student, profile, tokens, pairs, np.zeros(len(batches)))).max())
        wire = sum(step.move("learn: student's weights", flow, profile) for flow in gathers[at > 0])
        wire += sum(step.copy("learn: student's weights", _own(job, flow), job, profile) for flow in gathers[at > 0])
        wire += step.move("learn: gradients", reduction, profile)
        link = offload.gradients(job, at == packing.rounds - 1)
        wire += step.copy("learn: gradients", link, job, profile)
        waits = step.move("learn: attention", volume.attention(job, max(map(sum, batches))), profile)
        step.add("learn", waits + (max(work, wire) if profile.overlaps and job.zero.overlap else work + wire))
        step.micro_batches += 1


def _own(job: Job, flow: Flow) -> Link:
    """What the student's gathers take from the host."""
    return offload.fetched(flow, job.zero, job.student.sizes, job.ranks)


def simulate(job: Job, profile: Profile, written: Sequence[int], kept: Sequence[int]) -> StepTime:
    """One step of these rollouts; `job.ranks` ranks. Deterministic."""
    step = _rollouts(job, profile, written)
    if job.prefixes:
        step.join(Rollouts(job, profile, [p for p in job.prefixes if p], job.prompts.mean, by_teacher=True).run())
        step.move("rollout: prefixes", volume.prefixes(job), profile)
    if job.objective.teacher_writes:
        step.join(_futures(job, profile, written))
    learn(job, profile, kept, step)
    return step


def _rollouts(job: Job, profile: Profile, written: Sequence[int]) -> StepTime:
    """Of the slowest block that shares a teacher's shards: each has its part of the prompts, and waits for no other before the end."""
    size = math.lcm(*(job.holders(teacher) for teacher in job.teachers))
    if size >= job.ranks:
        return Rollouts(job, profile, written).run()
    blocks, samples = job.ranks // size, 1 if job.prefixes else job.recipe.rollout.samples_per_prompt
    room = [-(-len(written) // blocks)] * blocks
    parts = assign(room, [0] * blocks, (i // samples for i in range(len(written))))
    steps = [Rollouts(job, profile, [written[i] for i in part], ranks=size).run() for part in parts]
    slowest = max(steps, key=lambda step: step.total)
    slowest.waiting += slowest.total - statistics.fmean(step.total for step in steps)
    slowest.tokens, slowest.decoded = sum(step.tokens for step in steps), sum(step.decoded for step in steps)
    return slowest


def _futures(job: Job, profile: Profile, written: Sequence[int]) -> StepTime:
    """What the teacher writes for objective.kind topd, at states in the middle of rollouts, until the budget is spent."""
    settings = job.recipe.objective
    before = job.before + sum(written) / len(written) / 2
    states = int(settings.budget * sum(written) / (before + settings.horizon))
    step = Rollouts(job, profile, [settings.horizon] * states, before, by_teacher=True).run()
    if states:
        asked, told = states * before, states * (before + settings.horizon)
        step.move("learn: texts for the teacher", volume.texts(job, asked) + volume.texts(job, told), profile)
        flow = volume.teacher_embedding(job)
        seconds = step.move("learn: teacher's embedding", flow, profile)
        seconds += step.copy("learn: teacher's embedding", fetched(job, job.teachers[0], flow), job, profile)
        step.add("teacher writes", seconds)
    return step
