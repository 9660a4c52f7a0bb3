"""From a recipe and a device to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from katds.config import Recipe
from katds.errors import ConfigError
from katds.plan import recorded
from katds.plan.advise import advice, shortfalls
from katds.plan.hardware import Profile
from katds.plan.job import Job
from katds.plan.lengths import Lengths, longest
from katds.plan.memory import memory
from katds.plan.refusal import refusal
from katds.plan.report import Plan
from katds.plan.scaling import RANKS, scenarios
from katds.plan.simulate import simulate


@dataclass(frozen=True)
class Wishes:
    """What is asked for besides the recipe.

    Args:
        ranks: GPUs of the plan.
        lengths: folder of a recorded run; natural: of one that no rule ended, for comparison.
        stretch: so many times as long as recorded.
        weak: simulated steps have as many rollouts per rank as the plan's; else the recipe's step is shared by all.
    """

    ranks: int
    lengths: Path | None = None
    natural: Path | None = None
    stretch: float | None = None
    weak: bool = True
    scales: Sequence[int] = RANKS


def make_plan(recipe: Recipe, profile: Profile, wishes: Wishes) -> Plan:
    """Reads configurations, DeepSpeed's files, prompts and lengths; no weights. Raises ConfigError."""
    if wishes.natural is not None and wishes.lengths is None:
        raise ConfigError(
            "--natural is given without --lengths: there is nothing to compare it with. Give --lengths the run with the rule."
        )
    if wishes.stretch is not None and wishes.lengths is None:
        raise ConfigError("--stretch is given without --lengths: no lengths are recorded. Give --lengths a run.")
    lengths = (
        {"longest": longest(recipe)} if wishes.lengths is None else recorded.scenarios(wishes.lengths, wishes.natural)
    )
    if wishes.stretch is not None:
        limit = recipe.rollout.max_new_tokens
        lengths = {name: each.stretched(wishes.stretch, limit) for name, each in lengths.items()}
    job = make_job(recipe, profile, wishes.ranks, next(iter(lengths.values())))
    found = memory(job)
    times = [] if wishes.lengths is None else scenarios(job, profile, lengths, wishes.scales, wishes.weak)
    scaling = (
        f"{job.rollouts} rollouts per rank at every size (weak scaling)" if wishes.weak
        else f"the recipe's {job.per_step} rollouts shared by all ranks (strong scaling)"
    )  # fmt: skip
    sources = [
        f"device: {profile.source}; {profile.devices} per node", f"prompts: {job.prompts.source}",
        *(f"lengths, {name}: {_source(each, recipe)}" for name, each in lengths.items()), *_host(job, profile),
        *left_out(job), *profile.unmeasured(max([wishes.ranks, *(each.ranks for each in times)])),
    ]  # fmt: skip
    return Plan(
        job, profile, found, shortfalls(job, found, profile), advice(job, profile), simulate(job, profile, *job.drawn), scaling,
        times, sources,
    )  # fmt: skip


def make_job(recipe: Recipe, profile: Profile, ranks: int, lengths: Lengths) -> Job:
    """Raises ConfigError, also where a run would be refused on so many ranks."""
    prompts, steps = recorded.prompts(recipe), recipe.train.steps or 1
    job = Job.of(recipe, ranks, profile.device, prompts, lengths, steps, profile.devices)
    if (why := refusal(job)) is not None:
        raise ConfigError(why)
    return job


def _source(lengths: Lengths, recipe: Recipe) -> str:
    longest, allowed = max([*lengths.written, *lengths.audit]), recipe.rollout.max_new_tokens
    longer = f"; up to {longest} tokens, more than rollout.max_new_tokens, {allowed}, which memory is planned for"
    return lengths.source + (longer if longest > allowed else "")


def left_out(job: Job) -> list[str]:
    """What the plan does not count of DeepSpeed's files, and of what the method does beside writing, scoring and learning."""
    recipe = job.recipe
    found = list(dict.fromkeys(line for zero in (job.zero, *(t.zero for t in job.teachers)) for line in zero.ignored))
    if recipe.teacher_writes:
        found.append(
            "what the teacher writes itself is that of the first step; it needs no more memory than the rollouts that follow"
        )
    if recipe.objective.aligns_text and not recipe.data.train.exists():
        found.append(
            "the teacher is taken to read as many tokens as the student writes; in its own tokens they may be more"
        )
    return found


def _host(job: Job, profile: Profile) -> list[str]:
    """Rates that count where something is offloaded."""
    away = job.zero.optimizer_on != "device" or any(zero.away for zero in (job.zero, *(t.zero for t in job.teachers)))
    if profile.device == "cpu" or not away:
        return []
    link, memory_rate, disk = (rate / 1e9 for rate in (profile.host_link, profile.host_bandwidth, profile.disk))
    return [
        f"host: {link:.3g} GB/s to and from each device, {memory_rate:.3g} for a node's memory, {disk:.3g} for its NVMe "
        "(assumed unless measured)"
    ]
