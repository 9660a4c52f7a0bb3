"""Bytes that a rank moves in each phase of a step, from sizes alone; against real engines they are exact (tests/plan/test_plan_volume.py).

What travels is padded: every parameter is a multiple of the ranks that share it. Left out, since it is some bytes: gradient norm,
statistics at the end of a step, and lists of Python values that `Collective.gather` passes on. Of these only texts count: what the
teacher has written first, and what it reads and writes for objective.kind topd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from katds.core.packing import Plan
from katds.core.types import Need
from katds.plan.hardware import Profile
from katds.plan.job import Job, Teacher
from katds.plan.models import ModelShape
from katds.plan.signal import TOKEN_BYTES
from katds.plan.zero import Gathers, ZeroSettings, gathers

SURVEY_NUMBERS = 6  # int64 of every rollout, in `katds.train.share.survey`
REPORT_NUMBERS = 3  # int64 of every rank, in a round's reduction
ID_BYTES = 4  # of a token id in an array; pickled by itself it has 2 or 3 and some


@dataclass(frozen=True)
class Flow:
    """Collectives of one kind.

    Args:
        received: bytes that come to a rank from others, or in a reduce-scatter go from it to others.
        ranks: of the group.
        own: bytes of the rank's own parts; offloaded ones come to the device first. With one rank they are all that there is.
    """

    received: int = 0
    calls: int = 0
    ranks: int = 1
    own: int = 0

    def times(self, count: int) -> Flow:
        return Flow(self.received * count, self.calls * count, self.ranks, self.own * count)

    def __add__(self, other: Flow) -> Flow:
        """Of the same kind, or of none yet."""
        return Flow(
            self.received + other.received, self.calls + other.calls, max(self.ranks, other.ranks), self.own + other.own
        )

    def seconds(self, profile: Profile) -> float:
        """At the profile's rates, with nothing beside it."""
        if self.ranks == 1:
            return 0.0
        return profile.collective(self.received * self.ranks / (self.ranks - 1), self.ranks, self.calls)


def spread(sizes: Iterable[int], width: int, ranks: int, calls: int | None = None) -> Flow:
    """Parameters of so many elements, gathered or their gradients reduce-scattered; `calls`: as many as parameters unless it says
    otherwise."""
    sizes = list(sizes)
    part = sum(-(-size // ranks) for size in sizes) * width
    if ranks == 1:
        return Flow(own=part)
    return Flow(part * (ranks - 1), len(sizes) if calls is None else calls, ranks, part)


def student_view(job: Job) -> Flow:
    """Once per rollout phase, or with `rollout.weights: copy` once after the updates. Small weights are there, until the view closes."""
    return spread(_large(job.student.sizes, job.zero), job.student.width, job.ranks)


def teacher_phase(job: Job, teacher: Teacher) -> Flow:
    """All of it, each time that it is lent whole."""
    return (
        spread(teacher.shape.sizes, teacher.shape.width, job.holders(teacher)) if teacher.gather == "phase" else Flow()
    )


def teacher_forward(job: Job, teacher: Teacher) -> Flow:
    """Of one round."""
    ranks, shape = job.holders(teacher), teacher.shape
    if teacher.gather != "layer":
        return Flow()
    found = gathers(shape.forward_order, teacher.zero, ranks)
    return _gathered(found.sizes, shape.width, ranks, teacher.zero, found.calls)


def teacher_head(job: Job) -> Flow:
    """Gathered for the loss over the whole vocabulary, once per step."""
    teacher = job.teachers[0]
    if Need.FULL not in job.signal.needs or teacher.gather == "once":
        return Flow()
    return _matrix(job, teacher)


def teacher_embedding(job: Job) -> Flow:
    """Gathered once per step where objective.kind topd compares what the teacher has written with what the student has."""
    teacher = job.teachers[0]
    return Flow() if teacher.gather == "once" else _matrix(job, teacher)


def _matrix(job: Job, teacher: Teacher) -> Flow:
    return spread([teacher.shape.vocabulary * teacher.shape.hidden], teacher.shape.width, job.holders(teacher))


def prefixes(job: Job) -> Flow:
    """What the teacher wrote first: all ranks know the texts; their signal, for an objective that reads it, goes to whoever goes on."""
    tokens = sum(job.prefixes)
    rows = Flow()
    if job.signal.guided and job.ranks > 1:
        received = tokens * 8 * job.signal.teacher_top_k * (job.ranks - 1) // job.ranks**2
        rows = Flow(received, 2, job.ranks)
    return texts(job, tokens) + rows


def texts(job: Job, tokens: float, width: int = ID_BYTES) -> Flow:
    """One gather of texts that ranks hold, about: Python values, as large on the wire on each rank as on the one with the most."""
    return Flow(int(tokens * width * (job.ranks - 1) / job.ranks), 2, job.ranks) if job.ranks > 1 else Flow()


def micro_batch_gathers(job: Job, after_view: bool, after_step: bool = False) -> list[Flow]:
    """Of a forward and its backward.

    Args:
        after_view: the first since a rollout phase, whose view has let go of the small weights, too. With hpZ it has left a copy in
            a rank's group, and all comes from there.
        after_step: the first since an update that no rollout phase followed. With hpZ each weight comes from all ranks once.
    """
    shape, zero, ranks = job.student, job.zero, job.ranks
    found = gathers(job.update_order, zero, ranks)
    small = [size for size in shape.sizes if size <= zero.persistent] if after_view else []
    return weights(found, shape, zero, ranks, small, after_step)


def weights(
    found: Gathers, shape: ModelShape, zero: ZeroSettings, ranks: int, small: Sequence[int], after_step: bool
) -> list[Flow]:
    """Of a pass over a model; see `micro_batch_gathers`."""
    sizes, calls = [*found.sizes, *small], found.calls + len(small)
    if zero.secondary == 1 or not after_step:
        return [_gathered(sizes, shape.width, ranks, zero, calls)]
    once = _large(shape.sizes, zero)
    again = Counter(sizes) - Counter(once)
    inside = _gathered(list(again.elements()), shape.width, ranks, zero, calls // 2)
    return [spread(once, shape.width, ranks, calls - calls // 2), inside]


def attention(job: Job, tokens: int) -> Flow:
    """The all-to-alls of a micro-batch of so many tokens that ranks share (`katds.parallel.sequence`): of query, key, value and output,
    in the forward, again where it is made anew for the backward, and of their gradients."""
    shape, size = job.student, job.sharers
    if size == 1:
        return Flow()
    passes = 3 if job.recipe.train.activation_checkpointing else 2
    row = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.width
    stretch = -(-tokens // size)
    return Flow(shape.layers * passes * stretch * row // size * (size - 1), 4 * shape.layers * passes, size)


def reduction(job: Job) -> Flow:
    """Gradients of a micro-batch."""
    sizes, ranks = job.student.sizes, job.ranks
    calls = -(-sum(sizes) // max(1, job.zero.bucket))
    return spread(sizes, job.zero.communication.itemsize, ranks, calls)


def after_update(job: Job) -> Flow:
    """The small weights, which every rank keeps whole."""
    return spread((s for s in job.student.sizes if s <= job.zero.persistent), job.student.width, job.ranks)


def control(values: int, ranks: int, calls: int = 1) -> Flow:
    """Reductions of so many 8-byte values over gloo, by recursive doubling (`katds.parallel.reduce`): of the rank that receives most."""
    if ranks == 1:
        return Flow()
    doublings = ranks.bit_length() - 1
    messages = doublings + (ranks != 1 << doublings)  # one more comes from beyond the power of two
    return Flow(8 * values * messages * calls, calls, ranks)


def round_control(ranks: int, rounds: int) -> Flow:
    """One reduction per round of the ranks that make it together, and the last, which finds nobody busy."""
    return control(REPORT_NUMBERS * ranks, ranks, rounds + 1)


def survey(job: Job, rollouts: int) -> Flow:
    return control(SURVEY_NUMBERS * rollouts, job.ranks)


def dealt(rows: Sequence[int], owners: Sequence[int], packing: Plan) -> list[int]:
    """Rows of the signal that each rank receives from others; `rows` of every rollout, `owners` the ranks that wrote them."""
    return [
        sum(rows[i] for batch in batches for i in batch if owners[i] != rank)
        for rank, batches in enumerate(packing.micro_batches)
    ]


def exchange(job: Job, rows: Sequence[int], owners: Sequence[int], packing: Plan) -> Flow:
    """The rollouts on their way to the ranks that learn from them: tokens and their signal, and of prefixes that have no signal, and are
    taken to be as long as their mean, tokens. Of the mean rank."""
    if job.ranks == 1:
        return Flow()
    received = sum(dealt(rows, owners, packing)) * (TOKEN_BYTES + job.signal.learnt_bytes)
    if job.prefixes and not job.signal.guided:
        received += round(sum(dealt([1] * len(rows), owners, packing)) * job.prefix) * TOKEN_BYTES
    return Flow(received // job.ranks, 1 + len(job.signal.needs), job.ranks)


def _large(sizes: Iterable[int], zero: ZeroSettings) -> list[int]:
    return [size for size in sizes if size > zero.persistent]


def _gathered(sizes: Sequence[int], width: int, ranks: int, zero: ZeroSettings, calls: int) -> Flow:
    """For a forward: from the shards, or from hpZ's copy, which is padded as they are."""
    if zero.secondary == 1 or ranks == 1:
        return spread(sizes, width, ranks, calls)
    group = min(zero.secondary, ranks)
    part = sum(-(-size // ranks) * ranks for size in sizes) * width // group
    return Flow(part * (group - 1), calls, group, part)
