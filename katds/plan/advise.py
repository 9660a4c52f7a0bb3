"""What does not fit, and settings that would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from katds.plan.hardware import GIB, Profile
from katds.plan.items import ALWAYS, LEARN, ROLLOUT, Item, Memory
from katds.plan.job import Job
from katds.plan.memory import memory
from katds.plan.models import ModelShape

TOLERATED = 0.1  # share of a round that gathering the teacher may add
MOST_CHUNK = 256
GUESSES = 4  # each is a plan's memory, a second or two for a large model


@dataclass(frozen=True)
class Advice:
    """`value`: of the setting; None: no value fits."""

    setting: str
    value: int | None
    reason: str


def shortfalls(job: Job, found: Memory, profile: Profile) -> list[str]:
    """A line for each phase that needs more than the device has, and for a node that needs more than its host has."""
    lines = []
    levers = {"rollout": _rollout_levers(job), "learning": _learn_levers(job)}
    for name, moments in (("rollout", ROLLOUT), ("learning", LEARN)):
        size, moment = found.peak(moments)
        if size > profile.usable:
            needs = f"{name} needs {size / GIB:.1f} GiB of {profile.usable / GIB:.1f}"
            lines.append(f"does not fit: {needs} ({moment}: {_listed(found.largest(moment))}); {levers[name]}")
    size, moment = found.peak(ALWAYS, "cpu", job.on_node)
    if 0 < profile.host_memory < size:
        needs = f"a node's {job.on_node} ranks need {size / GIB:.1f} GiB of its host's {profile.host_memory / GIB:.1f}"
        largest = _listed(found.largest(moment, "cpu"), job.on_node)
        lines.append(f"does not fit: {needs} ({moment}: {largest}); take more nodes, or offload less")
    return lines


def _listed(items: list[Item], ranks: int = 1) -> str:
    return ", ".join(f"{item.name} {item.bytes * (1 if item.once else ranks) / GIB:.1f}" for item in items)


def _rollout_levers(job: Job) -> str:
    levers = ["lower rollout.slots"]
    if any(teacher.gather != "layer" for teacher in job.teachers):
        levers.append("set teacher.gather to layer")
    if job.recipe.rollout.weights == "copy":
        levers.append("set rollout.weights to view")
    return _or([*levers, *_of_zero(job)])


def _learn_levers(job: Job) -> str:
    levers = ["lower train.micro_batch_tokens"]
    if not job.recipe.train.activation_checkpointing:
        levers.append("set train.activation_checkpointing")
    elif job.ranks > job.sharers:
        levers.append("raise train.sequence_parallel")
    return _or([*levers, *_of_zero(job)])


def _of_zero(job: Job) -> list[str]:
    more = [] if job.zero.bucket <= 10**8 else ["lower reduce_bucket_size in student.deepspeed"]
    return [*more, "take more GPUs"]


def _or(levers: list[str]) -> str:
    return ", ".join(levers[:-1]) + " or " + levers[-1]


def advice(job: Job, profile: Profile) -> list[Advice]:
    """A chunk, with it slots and with both a micro-batch as large as fit: the three together fit, too. Where not even one rollout
    fits, ranks that share it."""
    chunk = _chunk(job, profile)
    job = job.with_settings("rollout", chunk_tokens=chunk.value)
    slots = _slots(job, profile)
    if slots.value is not None:
        job = job.with_settings("rollout", slots=slots.value)
    micro_batch = _micro_batch(job, profile)
    return [slots, chunk, micro_batch, *(_sharers(job, profile) if micro_batch.value is None else [])]


def _slots(job: Job, profile: Profile) -> Advice:
    def peak(slots: int) -> int:
        return memory(job.with_settings("rollout", slots=slots), ("rollout",)).peak(ROLLOUT)[0]

    most = job.rollouts
    fits = largest_within(peak, 1, most, profile.usable)
    if fits is None:
        return Advice("rollout.slots", None, "not even one slot fits")
    why = "all rollouts of a rank at once" if fits == most else f"more would exceed {profile.usable / GIB:.1f} GiB"
    return Advice("rollout.slots", fits, why)


def _sharers(job: Job, profile: Profile) -> list[Advice]:
    """The fewest ranks that have memory to learn from the longest rollout together."""
    for size in range(job.sharers + 1, job.ranks + 1):
        if job.ranks % size or job.student.heads % size or job.student.kv_heads % size:
            continue
        shared = job.with_settings("train", micro_batch_tokens=1, sequence_parallel=size)
        if memory(shared, ("learn",)).peak(LEARN)[0] <= profile.usable:
            return [Advice("train.sequence_parallel", size, "ranks that can learn from the longest rollout together")]
    return []


def _micro_batch(job: Job, profile: Profile) -> Advice:
    longest = job.prompts.longest + job.recipe.rollout.max_new_tokens - 1
    most = -(-job.rollouts // job.recipe.train.minibatches) * longest
    longest = -(-longest // job.sharers)

    def peak(tokens: int) -> int:
        return memory(job.with_settings("train", micro_batch_tokens=tokens), ("learn",)).peak(LEARN)[0]

    fits = largest_within(peak, longest, most, profile.usable)
    if fits is None:
        return Advice(
            "train.micro_batch_tokens", None, f"the longest rollout, {longest} tokens, does not fit by itself"
        )
    why = "all rollouts of a rank in one" if fits == most else f"more would exceed {profile.usable / GIB:.1f} GiB"
    return Advice("train.micro_batch_tokens", fits, f"{why}; a rollout may have {longest}")


def _chunk(job: Job, profile: Profile) -> Advice:
    """The least power of two with which a teacher's chunk is worth its forward."""
    slots, name = job.slots, "rollout.chunk_tokens"

    def cost(chunk: int) -> tuple[float, float]:
        """Seconds of a round with the full slots, and what of it a larger chunk would make rarer."""
        needed = extra = 0.0
        for teacher in job.teachers:
            shape = teacher.shape
            work = shape.token_flops * slots * chunk / profile.flops
            read = shape.bytes / profile.bandwidth
            if teacher.gather == "layer":
                read = max(read, profile.collective(shape.bytes, job.holders(teacher), len(shape.sizes)))
                if teacher.zero.away:
                    read = max(read, shape.bytes / job.holders(teacher) / profile.host_link)
            needed, extra = needed + work, extra + max(0.0, read - work)
        return needed + chunk * _token_step(job.student, profile, slots), extra

    chunk = 16
    while chunk < MOST_CHUNK and cost(chunk)[1] > TOLERATED * cost(chunk)[0]:
        chunk *= 2
    needed, extra = cost(chunk)
    what = "gathering and reading" if any(t.gather == "layer" and job.ranks > 1 for t in job.teachers) else "reading"
    return Advice(
        name, chunk, f"{what} the teacher's weights then adds {extra / needed:.0%} to a round; a larger one stops later"
    )


def _token_step(shape: ModelShape, profile: Profile, rows: int) -> float:
    return (
        max(shape.token_flops * rows / profile.flops, shape.multiplied * shape.width / profile.bandwidth)
        + profile.token_step
    )


def largest_within(peak: Callable[[int], int], low: int, high: int, limit: int) -> int | None:
    """A number from `low` to `high` whose peak is within the limit, about as large as there is; None where there is none.

    The peak is a maximum of straight lines, so that between two of its points it is below their straight line: a guess on it fits, but
    for rounding.
    """
    least, most = peak(low), peak(high)
    if least > limit:
        return None
    if most <= limit:
        return high
    for _ in range(GUESSES):
        guess = low + max(1, int((limit - least) / (most - least) * (high - low)))
        if guess == high or (found := peak(guess)) > limit:
            break
        low, least = guess, found
    return low
