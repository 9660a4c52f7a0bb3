"""Why a run of a recipe on so many ranks would be refused before it begins, as `katds.run` refuses it."""

from __future__ import annotations

from katds.plan.job import Job


def refusal(job: Job) -> str | None:
    """A message for the user; None: it would run."""
    return _sharing(job) or _secondary(job) or _blocks(job)


def _sharing(job: Job) -> str | None:
    size, heads, keys = job.recipe.train.sequence_parallel, job.student.heads, job.student.kv_heads
    if any(count % size for count in (job.ranks, heads, keys)):
        return (
            f"train.sequence_parallel is {size}, which must divide the {job.ranks} ranks, and the {heads} query and {keys} key heads of "
            "student.path. Give a divisor of all, or 1."
        )
    return None


def _secondary(job: Job) -> str | None:
    settings = {
        "student": job.zero,
        **dict(zip(job.recipe.every_teacher(), (t.zero for t in job.teachers), strict=True)),
    }
    for section, zero in settings.items():
        if job.ranks % min(zero.secondary, job.ranks):
            return (
                f"{section}.deepspeed: zero_hpz_partition_size is {zero.secondary}, which does not divide the {job.ranks} ranks. Set it to "
                "the ranks of a node."
            )
    return None


def _blocks(job: Job) -> str | None:
    for section, teacher in zip(job.recipe.every_teacher(), job.teachers, strict=True):
        size = teacher.shard if isinstance(teacher.shard, int) else job.holders(teacher)
        if job.ranks % size:
            return (
                f"{section}.shard is {teacher.shard}: blocks of {size} ranks, which do not divide the {job.ranks} ranks. Give a divisor, "
                "or world."
            )
        if teacher.zero.secondary > 1 and teacher.shard != "world":
            return f"{section}.deepspeed sets zero_hpz_partition_size, and {section}.shard is {teacher.shard}. Remove one of the two."
    return None
