"""How long a rollout may be for one rank's memory: to learn from it, and to write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from katds.plan.hardware import Profile
from katds.plan.items import LEARN, ROLLOUT
from katds.plan.job import Job
from katds.plan.lengths import WHOLE, Lengths, Prompts
from katds.plan.memory import memory

PROBES = (1024, 8192)  # tokens
GUESSES = 3  # each is a plan's memory, some seconds for a large model
NEAR = 0.02  # of a guess: what is between two points so near to each other is on their line


@dataclass(frozen=True)
class Reach:
    """Of rollouts that are written and learnt from one at a time; None: not even a short one fits.

    Args:
        fixed: bytes of learning that do not grow, and per_token that do, near the longest.
        learnt: tokens of the longest that can be learnt from, by all ranks that share it.
        written: tokens of the longest for which a slot's caches have room.
    """

    fixed: float
    per_token: float
    learnt: int | None
    written: int | None


def reach(job: Job, profile: Profile) -> Reach:
    def learning(tokens: int) -> int:
        return memory(_one(job, tokens), ("learn",)).peak(LEARN)[0]

    def writing(tokens: int) -> int:
        return memory(_one(job, tokens), ("rollout",)).peak(ROLLOUT)[0]

    (low, least), (high, most) = points = _near(learning, profile.usable)
    per_token = (most - least) / (high - low)
    fixed = least - per_token * low
    return Reach(
        fixed, per_token, _within(points, profile.usable), _within(_near(writing, profile.usable), profile.usable)
    )


def _one(job: Job, tokens: int) -> Job:
    """With a step of one rollout per rank, each a micro-batch by itself and all of it a response."""
    changed = job.with_settings(
        "rollout", prompts_per_step=job.ranks, samples_per_prompt=1, max_new_tokens=tokens, slots=1
    ).with_settings("train", micro_batch_tokens=1, minibatches=1)
    return replace(changed, prompts=Prompts(1, 1.0, "none"), lengths=Lengths([tokens], [tokens], WHOLE))


Points = Sequence[tuple[int, int]]


def _near(size: Callable[[int], int], limit: int) -> Points:
    """Two points of a convex `size` between which, or near which, it reaches the limit: what is beyond two points lies above their line,
    and what is between them below it."""
    points = [(tokens, size(tokens)) for tokens in PROBES]
    for _ in range(GUESSES):
        (low, least), (high, most) = points[-2:]
        guess = low + int((limit - least) * (high - low) / max(1, most - least))
        if guess <= PROBES[0] or min(abs(guess - tokens) for tokens, _ in points) < NEAR * guess:
            break
        points = sorted([*points, (guess, size(guess))])
        above = next((i for i, (_, value) in enumerate(points) if value > limit), len(points) - 1)
        points = points[max(0, above - 1) : max(0, above - 1) + 2]
    return points[-2:]


def _within(points: Points, limit: int) -> int | None:
    (low, least), (high, most) = points
    found = low + int((limit - least) * (high - low) / max(1, most - least))
    return found if found > 0 else None
