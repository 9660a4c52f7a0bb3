"""End rollouts at lengths that another run has recorded: the length-matched control.

The random control of KAT's paper (arXiv 2606.09471) has lengths of its own, so that it cannot tell whether KAT gains by what it cuts or
by how much. This one cuts as often as the recorded run did at every length, but whichever rollout has come so far.

To draw a recorded rollout for each new one would cut too few: the fate of one that was cut falls to many that end by themselves before.
So rollouts of the record that ended by themselves count as censored, and cuts are drawn from the Kaplan-Meier estimate
(1958) of their distribution: of the rollouts that reach a length, the same share is cut there as in the record. What differs is who is
left: KAT takes the trapped ones, which would have gone on for long; here some of those stay and are cut later, or never.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from katds.core import counter, lengths
from katds.core.lengths import StepLengths
from katds.core.stop.base import RunFacts, StopSettings
from katds.core.stop.simple import PlannedRule
from katds.core.types import EOS, LENGTH, Cut, RolloutRequest

_STREAM = 0x52504C59


class ReplaySettings(StopSettings):
    """End rollouts at lengths drawn from those of a recorded run: the length-matched control."""

    kind: Literal["replay"] = "replay"
    run: Path = Field(
        description="folder of the recorded run, e.g. of kat with another seed; its lengths.jsonl is read"
    )

    def contents(self) -> str:
        steps = lengths.read(self.run)
        return hashlib.sha256("".join(step.line(i) for i, step in enumerate(steps)).encode()).hexdigest()[:16]


class ReplayRule(PlannedRule):
    """Each rollout's cut is drawn from those of the same step of the record, or it gets none: a hash of (seed, rollout id).

    It is cut at the same token as the recorded one and keeps as many, unless it ends before. The audit group of the recorded run
    is not drawn from. A record of another number of steps is stretched: the nearest by fraction of training.

    Args:
        steps: of this run.
    """

    Settings: ClassVar[type[StopSettings]] = ReplaySettings
    reasons: tuple[str, ...] = ("replay",)

    def __init__(self, seed: int, steps: int, record: Sequence[StepLengths]) -> None:
        super().__init__()
        assert steps >= 1 and record, f"{steps} steps, {len(record)} recorded"
        self._seed, self._steps = seed, steps
        self._cuts = [_Cuts(step) for step in record]

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        return cls(run.seed, run.steps, lengths.read(settings.run))

    def plan(self, request: RolloutRequest) -> Cut | None:
        # The middle of step k of n lies in step (2k + 1) m / 2n of m.
        recorded = (2 * self.step + 1) * len(self._cuts) // (2 * self._steps)
        cuts = self._cuts[min(recorded, len(self._cuts) - 1)]
        return cuts.at(counter.uniform(counter.key(self._seed, request.id, _STREAM), 0))


class _Cuts:
    """The cuts of one recorded step, and how probable each is."""

    def __init__(self, step: StepLengths) -> None:
        rollouts = list(zip(step.lengths, step.kept, step.reasons, strict=True))
        natural = sorted(length for length, _, reason in rollouts if reason in (EOS, LENGTH))
        made = sorted((length, kept) for length, kept, reason in rollouts if reason not in (EOS, LENGTH))
        self._cuts = [Cut(kept, length, ReplayRule.reasons[0]) for length, kept in made]
        self._bounds: list[float] = []  # cumulated probability of the cuts up to each
        left = 1.0  # probability of no cut before the current length
        for i, (length, _) in enumerate(made):
            first = bisect_left(made, (length, -1))  # a natural end at the very token comes before the cut
            at_risk = len(made) - first + len(natural) - bisect_right(natural, length)
            if first == i:
                share = left / at_risk
            self._bounds.append((self._bounds[-1] if i else 0.0) + share)
            if i + 1 == len(made) or made[i + 1][0] != length:
                left -= share * (i + 1 - first)

    def at(self, draw: float) -> Cut | None:
        """The cut of a draw in (0, 1)."""
        place = bisect_right(self._bounds, draw)
        return self._cuts[place] if place < len(self._cuts) else None
