"""What the engines of DeepSpeed hold of student and teachers on the fullest rank, and on its host."""

from __future__ import annotations

from katds.core.types import Need
from katds.plan.items import ALWAYS, LEARN, ROLLOUT, STEP, Memory, number
from katds.plan.job import Job, Teacher
from katds.plan.models import ModelShape
from katds.plan.zero import ZeroSettings, gathered, gathers, on_disk, persistent, shard, sub_groups


def held(found: Memory, job: Job) -> None:
    """Adds it to `found`."""
    _student(found, job)
    _optimizer(found, job)
    for teacher in job.teachers:
        _teacher(found, job, teacher)
    largest = max((job.student, *(t.shape for t in job.teachers)), key=lambda shape: shape.stored)
    found.add(
        "checkpoint being read", f"files of {largest.name}, mapped by rank 0", largest.stored, ("load",), "cpu", True
    )
    # A weight is read whole, and divided then.
    size = max(largest.sizes) * largest.width
    found.add("weight being read", f"the largest of {largest.name}", size, ("load",))


def _student(found: Memory, job: Job) -> None:
    zero, shape, ranks = job.zero, job.student, job.ranks
    _shard(found, "student", shape, zero, ranks)
    found.add("student: copy in a group (hpZ)", *secondary(shape, zero, ranks), LEARN)
    whole = _small(found, "student", shape, zero, ranks)
    if job.recipe.rollout.weights == "copy":
        found.add("student: inference copy", f"{shape.width} B x {count(shape)}", shape.bytes, STEP)
    else:
        everything = gathered(shape.sizes, ranks, zero.away) * shape.width
        found.add("student: gathered view", f"{shape.width} B x {count(shape)}", everything - whole, ROLLOUT)


def _optimizer(found: Memory, job: Job) -> None:
    """With the gradients, which it reads."""
    zero, shape, ranks = job.zero, job.student, job.ranks
    own, on = shard(shape.sizes, ranks), zero.optimizer_on
    each = f"B x {count(shape)} / {ranks}"
    found.add("student: fp32 weights", f"4 {each}", 4 * own, ALWAYS, on)
    found.add("student: AdamW moments", f"2 x 4 {each}", 8 * own, STEP, on)
    size = zero.gradients.itemsize * own
    found.add("student: gradients", f"{zero.gradients.itemsize} {each}, kept between steps", size, ALWAYS, on)
    if on != "device":
        found.add("student: gradients for the optimizer", f"4 {each}", 4 * own, ALWAYS, on)
        parts = sub_groups(shape.sizes, ranks, zero.sub_group)
        _locked(found, "student: gradients", [size, *(4 * part for part in parts)], zero.pinned_optimizer)
    if zero.contiguous:
        # Memory of a CPU is taken when it is first written to.
        used = min(zero.bucket, shape.parameters) if job.device == "cpu" else zero.bucket
        how = f"reduce_bucket_size {number(zero.bucket)} elements, kept between steps"
        found.add("student: reduce bucket", how, used * zero.communication.itemsize, STEP)


def _teacher(found: Memory, job: Job, teacher: Teacher) -> None:
    shape, zero, ranks = teacher.shape, teacher.zero, job.holders(teacher)
    name = teacher_name(job, teacher)
    found.add(f"{name}: copy in a group (hpZ)", *secondary(shape, zero, ranks), ALWAYS)
    _shard(found, name, shape, zero, ranks)
    whole = _small(found, name, shape, zero, ranks)
    everything = f"{shape.width} B x {count(shape)}"
    if teacher.gather == "once":
        found.add(f"{name}: whole (gather once)", everything, shape.bytes, STEP)
    elif teacher.gather == "phase":
        size = gathered(shape.sizes, ranks, zero.away) * shape.width - whole
        found.add(f"{name}: gathered (gather phase)", everything, size, ROLLOUT)
    else:
        size = gathers(shape.forward_order, zero, ranks).most * shape.width
        at = ("decode", "score") if job.recipe.rollout.overlap else ("score",)
        found.add(f"{name}: gathered layers", "as many as DeepSpeed fetches ahead", size, at)
        # What is fetched together arrives in one buffer and is copied out of it.
        found.add(f"{name}: gather buffer", "stage3_prefetch_bucket_size", gather_buffer(shape, zero, ranks), at)
    if Need.FULL in job.signal.needs and teacher.gather != "once":
        head = shape.vocabulary * shape.hidden * shape.width
        how = f"{shape.width} B x {shape.vocabulary} x {shape.hidden}, gathered for the loss"
        found.add(f"{name}: head", how, head, LEARN)


def _shard(found: Memory, name: str, shape: ModelShape, zero: ZeroSettings, ranks: int) -> None:
    own = shard(shape.sizes, ranks)
    disk = on_disk(own, zero)
    place = "cpu" if zero.away else "device"
    how = f"{shape.width} B x {count(shape)} / {ranks}"
    found.add(f"{name}: shard", how, (own - disk) * shape.width, ALWAYS, place)
    found.add(f"{name}: shard on NVMe", how, disk * shape.width, ALWAYS, "nvme")
    found.add(f"{name}: buffers of NVMe", "buffer_count x buffer_size", zero.swap * shape.width, ALWAYS, "cpu")
    if zero.away and own > disk:
        # Of a trained model it is one buffer, locked whatever pin_memory says; of others DeepSpeed locks each parameter's part by itself.
        trained = name == "student"
        parts = [own - disk] if trained else [-(-size // ranks) for size in shape.sizes]
        pinned = (trained and found.device == "cuda") or zero.pinned_parameters
        _locked(found, f"{name}: shard", [part * shape.width for part in parts], pinned)


def _locked(found: Memory, name: str, sizes: list[int], pinned: bool) -> None:
    """What page-locking takes beyond `sizes`, bytes of buffers on the host."""
    extra = sum((1 << (size - 1).bit_length()) - size for size in sizes if size) if pinned else 0
    found.add(f"{name}, page-locked", "PyTorch locks whole powers of two (pin_memory)", extra, ALWAYS, "cpu")


def _small(found: Memory, name: str, shape: ModelShape, zero: ZeroSettings, ranks: int) -> int:
    """Bytes of the small weights, which are added."""
    size = persistent(shape, zero, ranks) * shape.width
    how = f"up to {number(zero.persistent)} elements each, whole on every rank"
    found.add(f"{name}: small weights", how, size, ALWAYS)
    return size


def secondary(shape: ModelShape, zero: ZeroSettings, ranks: int) -> tuple[str, int]:
    """How, and bytes, of what hpZ keeps of weights that were gathered, until they change."""
    group = min(zero.secondary, ranks)
    size = gathered(shape.sizes, ranks) // group * shape.width if group > 1 else 0
    return f"{shape.width} B x {count(shape)} / {group}", size


def gather_buffer(shape: ModelShape, zero: ZeroSettings, ranks: int) -> int:
    """Bytes."""
    return min(zero.prefetch, shape.parameters) * shape.width if ranks > 1 else 0


def teacher_name(job: Job, teacher: Teacher) -> str:
    return f"teacher {teacher.shape.name}" if len(job.teachers) > 1 else "teacher"


def count(shape: ModelShape) -> str:
    return f"{number(shape.parameters)}"
