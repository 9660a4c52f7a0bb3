"""KAT: end a rollout that has fallen into a low-KL agreement trap (arXiv 2606.09471).

In the trap the student has drifted into an unrecoverable prefix, the teacher agrees with the degraded text token by
token, and nothing is learned. The detector sees it as several consecutive windows with a low mean divergence.

Invariants:
- Cuts, holes and minima do not depend on how a rollout is split into chunks, to the last bit.
- Every cut keeps at least `min_kept` tokens.
- After `finish_step` all ranks hold the same threshold, whatever their number and whoever wrote which rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

import torch

from katds.core.collective import Collective
from katds.core.stop.base import RunFacts, StopRule, StopSettings
from katds.core.stop.kat_settings import KatSettings, Source, Supervise, warm_up
from katds.core.threshold import AdaptiveThreshold
from katds.core.types import Cut, RolloutRequest
from katds.core.windows import WindowMeans
from katds.errors import DesyncError


class _Track:
    """What the rule remembers of a rollout that is being written."""

    __slots__ = ("cut", "low", "means", "minimum", "trap")

    def __init__(self, means: WindowMeans) -> None:
        self.means = means
        self.low = 0  # consecutive low windows
        self.minimum = math.inf  # over the evaluated windows; inf: there was none
        self.trap: tuple[int, int | None] | None = None  # its tokens [from, to), the end once it is known
        self.cut: Cut | None = None


class KatRule(StopRule):
    """Ends a rollout at the `persistence`-th consecutive low window and keeps what precedes the first of them.

    d_t = KL(p_t || q_t) of response token t, on top 64 and a tail bucket; z_t = (d_{t-W+1} + .. + d_t) / W, for every `stride`-th t; low is
    z_t < s_k, the 1-eta quantile of the last `capacity` rollout minima min_t z_t, as it was before step k (`core.threshold`).

    Open, and settings here: the stride, L0, whose minima enter (`source`), and whose 64 tokens these are (`support`): by
    default the student's, where reverse KL has its weight and whose probabilities are known as they are written.

    The paper's ablation by stages adds the agreement stage, or what comes after it, back to the loss (`supervise`). Where that
    stage ends is [open]: here it is the tokens of all consecutive low windows of the run that fired, by the same threshold that found
    its beginning; one that no window ends lasts to the end of the rollout. A later trap of the same rollout is left in.

    With several teachers [open] one threshold is the quantile of all their minima: one queue fills sooner than each of several. A teacher
    that agrees more with the student than the others has more of its rollouts ended, and the threshold follows the mixture of prompts.

    Args:
        window: W, tokens per window.
        stride: tokens between two windows.
        persistence: T, consecutive low windows that fire.
        min_kept: L0; a window that starts before this token is never low, as KL falls naturally there: such a run of windows is no trap.
        threshold: s; a window is low if its mean is smaller. None: no window is.
        source: whose minima feed the threshold: `audit` rollouts only, `completed` (all that this rule did not end),
            or `all`.
        supervise: what the loss reads: the tokens `before` the trap; these and its `agreement`: the rollout is ended at the first
            window that is not low any more; or all but the trap, which becomes a hole (`after`): nothing is ended.
    """

    Settings: ClassVar[type[StopSettings]] = KatSettings
    reasons: tuple[str, ...] = ("kat",)
    needs_divergence = True

    def __init__(
        self,
        window: int,
        stride: int,
        persistence: int,
        min_kept: int,
        threshold: AdaptiveThreshold,
        source: Source,
        supervise: Supervise = "before",
        reads_teacher_top_k: bool = False,
    ) -> None:
        smallest = min(window, stride, persistence)
        assert smallest >= 1, f"window {window}, stride {stride}, persistence {persistence}: each is at least 1"
        assert min_kept >= 0, f"min_kept {min_kept} is negative"
        assert source in get_args(Source), f"threshold source {source!r} is none of {get_args(Source)}"
        assert supervise in get_args(Supervise), f"supervise {supervise!r} is none of {get_args(Supervise)}"
        self._window = window
        self._stride = stride
        self._persistence = persistence
        self._first_low = min_kept + window  # the first t whose window may be low
        self._run_tokens = window + (persistence - 1) * stride  # from the first low window's start to the last's end
        self._threshold = threshold
        self._source = source
        self._supervise = supervise
        self.reads_teacher_top_k = reads_teacher_top_k
        if supervise == "after":
            self.reasons = ()
        self._tracks: dict[int, _Track] = {}
        self._minima: dict[int, float] = {}  # of this rank's admitted rollouts of the step, by rollout id
        self._pushed_mean: float | None = None

    @classmethod
    def from_settings(cls, settings: Any, run: RunFacts) -> Self:
        """See `warm_up`."""
        queue = settings.threshold
        steps, source = warm_up(settings, run)
        threshold = AdaptiveThreshold(queue.eta, queue.capacity, queue.min_entries, steps)
        stride, min_kept = settings.resolved_stride, settings.resolved_min_kept
        return cls(
            settings.window, stride, settings.persistence, min_kept, threshold, source, settings.supervise, settings.reads_teacher_top_k
        )  # fmt: skip

    def begin(self, request: RolloutRequest) -> None:
        assert request.id not in self._tracks, f"rollout {request.id} has begun already"
        self._tracks[request.id] = _Track(WindowMeans(self._window, self._stride))

    def observe(self, request: RolloutRequest, tokens: Sequence[int], divergences: Sequence[float]) -> Cut | None:
        track = self._tracks[request.id]
        if track.cut is not None and not request.audit:
            return None
        threshold = -math.inf if self._threshold.value is None else self._threshold.value
        made = None
        for t, mean in track.means.feed(divergences):
            if mean < track.minimum:
                track.minimum = mean
            track.low = track.low + 1 if mean < threshold and t >= self._first_low else 0
            if track.cut is None and (kept := self._judge(track, t)) is not None:
                made = track.cut = Cut(kept, t, self.reasons[0])
                if not request.audit:
                    break
        return made

    def _judge(self, track: _Track, t: int) -> int | None:
        """Notes where the rollout's first trap begins and ends; returns how many tokens a cut after t tokens keeps, or None."""
        if track.trap is None:
            if track.low < self._persistence:
                return None
            track.trap = (t - self._run_tokens, None)
            return track.trap[0] if self._supervise == "before" else None
        start, stop = track.trap
        if stop is not None or track.low:
            return None
        stop = t - self._stride  # the last low window's end
        track.trap = (start, stop)
        return stop if self._supervise == "agreement" else None

    def end(self, request: RolloutRequest, terminated: bool) -> tuple[int, int] | None:
        """The hole is the trap, where all else is supervised."""
        assert not (terminated and request.audit), f"rollout {request.id} is in the audit group but was terminated"
        track = self._tracks.pop(request.id)
        admitted = self._source == "all" or (request.audit if self._source == "audit" else not terminated)
        if admitted and track.minimum < math.inf:
            self._minima[request.id] = track.minimum
        if self._supervise != "after" or track.trap is None:
            return None
        start, stop = track.trap
        return (start, track.means.tokens if stop is None else stop)

    def finish_step(self, collective: Collective, first_id: int, count: int) -> None:
        """Collective: one sum of [2, count] float64, a minimum and a presence per rollout; pushed in id order."""
        assert not self._tracks, f"rollouts {sorted(self._tracks)[:8]} have not ended"
        own = torch.zeros(2, count, dtype=torch.float64)
        for rollout_id, minimum in self._minima.items():
            i = rollout_id - first_id
            assert 0 <= i < count, f"rollout {rollout_id} is not of this step ({first_id} + {count})"
            own[0, i], own[1, i] = minimum, 1.0
        self._minima.clear()
        minima, presence = collective.sum(own).tolist()
        pushed = []
        for rollout_id, (minimum, ranks) in enumerate(zip(minima, presence, strict=True), first_id):
            if ranks not in (0.0, 1.0) or not math.isfinite(minimum):
                raise DesyncError(
                    f"rollout {rollout_id} came to the KAT threshold from {ranks:g} ranks with minimum {minimum}; "
                    "each rollout belongs to one rank and its minimum is finite"
                )
            if ranks:
                pushed.append(minimum)
        self._threshold.push(pushed)
        self._threshold.finish_step()
        self._pushed_mean = math.fsum(pushed) / len(pushed) if pushed else None

    def metrics(self) -> Mapping[str, float]:
        """`kat/entries`, `kat/threshold` [nats] once warm, and `kat/min_window` [nats], the mean of the last minima."""
        scalars = {"kat/threshold": self._threshold.value, "kat/min_window": self._pushed_mean}
        return {"kat/entries": float(self._threshold.entries)} | {k: v for k, v in scalars.items() if v is not None}

    def state_dict(self) -> dict[str, Any]:
        """Between steps only: rollouts in flight are not part of the state."""
        assert not self._tracks and not self._minima, "the state of KAT is saved between steps"
        return self._threshold.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._threshold.load_state_dict(state)
