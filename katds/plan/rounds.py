"""The rounds of a rollout phase, simulated: the engine's own scheduler deals rollouts to slots, and the slowest rank counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from katds.plan import offload, volume
from katds.plan.hardware import Profile
from katds.plan.job import Job, Teacher
from katds.plan.models import ModelShape
from katds.plan.offload import Link
from katds.plan.step_time import StepTime
from katds.plan.volume import Flow
from katds.rollout.slots import assign

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def forward_seconds(shape: ModelShape, profile: Profile, tokens: Array, pairs: Array, keys: Array) -> Array:
    """Of one forward each.

    Args:
        tokens: read by it. pairs: of a token and one that it attends to. keys: positions of the cache that it reads.
    """
    work = (shape.token_flops * tokens + shape.pair_flops * pairs) / profile.flops
    read = (shape.multiplied * shape.width + shape.key_bytes * keys) / profile.bandwidth
    return np.where(tokens > 0, np.maximum(work, read), 0.0)


class Rollouts:
    """Rounds of one rollout phase over all ranks.

    Args:
        written: tokens of each rollout. prompt: before each, in the mean; None: those of the prompts, and prefixes.
        by_teacher: the teacher writes, and nobody scores; its time is one phase, "teacher writes".
        ranks: that make their rounds together; None: all.
    """

    def __init__(
        self, job: Job, profile: Profile, written: Sequence[int], prompt: float | None = None, by_teacher: bool = False,
        ranks: int | None = None,
    ) -> None:  # fmt: skip
        self._job, self._profile, self._by_teacher = job, profile, by_teacher
        self._ranks = ranks or job.ranks
        # On a GPU, and where gathers do not queue behind the student's chunk.
        apart = profile.device == "cuda" and all(t.gather != "layer" or t.zero.overlap for t in job.teachers)
        self._beside = job.recipe.rollout.overlap and apart
        rollout = job.recipe.rollout
        self._waiting = deque(range(len(written)))
        self._written, self._samples = np.array(written, dtype=np.int64), rollout.samples_per_prompt
        self._chunk, self._prompt = rollout.chunk_tokens, job.before if prompt is None else prompt
        if prompt is not None or job.prefixes:
            self._samples = 1  # texts that nobody shares
        self._writer = job.teachers[0].shape if by_teacher else job.student
        self._teachers = () if by_teacher else job.teachers
        self._forwards = [volume.teacher_forward(job, teacher) for teacher in self._teachers]
        self._fetches = [
            fetched(job, teacher, flow) for teacher, flow in zip(self._teachers, self._forwards, strict=True)
        ]
        self._left = np.zeros((self._ranks, job.slots), dtype=np.int64)  # tokens until a slot ends; 0: free
        self._done = np.zeros((self._ranks, job.slots), dtype=np.int64)  # tokens in it
        self.decoded = np.zeros(self._ranks, dtype=np.int64)  # tokens of each rank, overshoot included
        self.step = StepTime(tokens=int(self._written.sum()))

    def run(self) -> StepTime:
        while (read := self._admit()) is not None:
            self._round(read)
        self._between_rounds()
        self.step.decoded = int(self.decoded.sum())
        return self.step

    def _admit(self) -> Array | None:
        """Prompt tokens that each rank reads; None once nothing is left to do."""
        read = np.zeros(self._ranks)
        if self._waiting:
            live = (self._left > 0).sum(1)
            given = assign(
                (self._left.shape[1] - live).tolist(), live.tolist(), (i // self._samples for i in self._waiting)
            )
            queue = list(self._waiting)
            for rank, own in enumerate(given):
                if own:
                    free = np.flatnonzero(self._left[rank] == 0)[: len(own)]
                    self._left[rank, free] = self._written[[queue[i] for i in own]]
                    self._done[rank, free] = 0
                    read[rank] = self._prompt * len({queue[i] // self._samples for i in own})
            for _ in range(sum(map(len, given))):
                self._waiting.popleft()
        return read if (self._left > 0).any() else None

    def _round(self, read: Array) -> None:
        job, profile, chunk, step = self._job, self._profile, self._chunk, self.step
        busy = self._left > 0
        rows = busy.sum(1).astype(np.float64)
        before = (busy * (self._done + self._prompt)).sum(1)
        keys = before + rows * chunk / 2  # of a token step, in the middle of the chunk
        tokens = rows * chunk
        none = np.zeros_like(rows)
        pairs = read * self._prompt / 2
        prefill = forward_seconds(self._writer, profile, read, pairs, none)
        decode = chunk * self._token_step(self._writer, rows, keys)
        if job.guided and not self._by_teacher:
            decode += chunk * self._token_step(job.teachers[0].shape, rows, keys)
        score = none
        for teacher, flow, fetch in zip(self._teachers, self._forwards, self._fetches, strict=True):
            share = job.reading / len(job.teachers)  # of the prompts, as if they were dealt evenly
            seen = pairs + tokens * keys / np.maximum(rows, 1)
            work = forward_seconds(teacher.shape, profile, share * (read + tokens), share * seen, share * keys)
            gather = step.move(_of(job, teacher), flow, profile) + step.copy(_of(job, teacher), fetch, job, profile)
            score = score + (np.maximum(work, gather) if profile.overlaps and teacher.zero.overlap else work + gather)
        if job.signal.by_teacher and not self._by_teacher:  # the student's head, once more
            score = score + 2 * job.student.hidden * job.student.vocabulary * tokens / profile.flops
        # Ranks meet once a round: whoever is done waits. The slowest rank's share of each phase counts.
        whole = np.maximum(prefill + decode, score) if self._beside else prefill + decode + score
        slowest = int(whole.argmax())
        if not self._by_teacher:
            step.add("prefill", float(prefill[slowest]))
        if self._by_teacher:
            step.add("teacher writes", float(whole[slowest]))
        elif self._beside:
            step.add("decode", float(whole[slowest] - prefill[slowest]))
        else:
            step.add("decode", float(decode[slowest]))
            step.add("teacher", float(score[slowest]))
        step.waiting += max(0.0, float(whole[slowest] - whole.mean()))  # a mean of equals may be larger by rounding
        step.rounds += 1
        self.decoded += busy.sum(1) * chunk
        self._left = np.where(busy, np.maximum(self._left - chunk, 0), 0)
        self._done = np.where(busy, self._done + chunk, 0)

    def _token_step(self, shape: ModelShape, rows: Array, keys: Array) -> Array:
        """Seconds of a step of every live slot; sampling passes some six times over the logits."""
        sampling = 6 * 4 * rows * shape.vocabulary / self._profile.bandwidth
        return forward_seconds(shape, self._profile, rows, keys, keys) + np.where(
            rows > 0, sampling + self._profile.token_step, 0.0
        )

    def _between_rounds(self) -> None:
        """What every round or the whole phase needs of the others."""
        job, profile, step = self._job, self._profile, self.step
        step.add("control", profile.latency * profile.doublings(self._ranks) * (step.rounds + 1))
        step.move("rollout: control", volume.round_control(self._ranks, step.rounds), profile)
        seconds = 0.0
        if not self._by_teacher:
            flow = volume.student_view(job)
            seconds += step.move("rollout: student's weights", flow, profile)
            link = offload.fetched(flow, job.zero, job.student.sizes, job.ranks)
            seconds += step.copy("rollout: student's weights", link, job, profile)
        for teacher in job.teachers:
            flow = volume.teacher_phase(job, teacher)
            seconds += step.move(_of(job, teacher), flow, profile)
            seconds += step.copy(_of(job, teacher), fetched(job, teacher, flow), job, profile)
        step.add("gather for the phase", seconds)


def fetched(job: Job, teacher: Teacher, flow: Flow) -> Link:
    return offload.fetched(flow, teacher.zero, teacher.shape.sizes, job.holders(teacher))


def _of(job: Job, teacher: Teacher) -> str:
    return "rollout: teacher" if len(job.teachers) == 1 else f"rollout: teacher {teacher.shape.name}"
