"""KAT's adaptive threshold: the upper quantile of the lowest window means of recent rollouts.

Invariants:
- `value` changes in `finish_step` only, so one step is judged by one threshold.
- It is a function of the pushed values in their order; equal pushes give equal bits on every rank and after a resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class AdaptiveThreshold:
    """s_k = quantile_{1-eta} of the last `capacity` rollout minima m = min_t z_t (KAT, arXiv 2606.09471).

    Args:
        eta: the threshold lies at the 1 - eta quantile; a larger eta ends fewer rollouts.
        capacity: minima kept, first in, first out (B).
        min_entries: no threshold before so many minima are held.
        min_steps: no threshold before so many calls of `finish_step`.

    Cost: one sort of at most `capacity` floats per step (4096: below a millisecond).
    """

    def __init__(self, eta: float, capacity: int, min_entries: int, min_steps: int) -> None:
        assert 0 < eta < 1, f"eta {eta} is not in (0, 1)"
        assert 1 <= min_entries <= capacity, f"min_entries {min_entries} is not in 1 .. capacity {capacity}"
        self._quantile = 1 - eta
        self._min_entries = min_entries
        self._min_steps = min_steps
        self._minima: deque[float] = deque(maxlen=capacity)
        self._steps = 0
        self.value: float | None = None  # [nats]; None until warm

    @property
    def entries(self) -> int:
        """Minima held."""
        return len(self._minima)

    def push(self, values: Iterable[float]) -> None:
        """Append minima [nats]; the oldest beyond `capacity` drop out. `value` stays until `finish_step`."""
        self._minima.extend(values)

    def finish_step(self) -> None:
        """Count a step and set the threshold of the next one."""
        self._steps += 1
        warm = self._steps >= self._min_steps and len(self._minima) >= self._min_entries
        self.value = quantile(sorted(self._minima), self._quantile) if warm else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible; Python writes floats so that they read back to the same bits."""
        return {"steps": self._steps, "minima": list(self._minima), "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._minima.clear()
        self._minima.extend(state["minima"])
        self.value = state["value"]


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of ascending, finite `ordered` with linear interpolation, bit-equal to `numpy.quantile`.

    Plain floats and not torch.quantile: no size limit, and the same bits whatever the number of threads.
    """
    assert ordered, "the quantile of nothing"
    position = (len(ordered) - 1) * q
    below = int(position)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    weight = position - below
    # Interpolate from the nearer end: at weight 1 the result is exactly `high`, and it never leaves [low, high].
    return low + (high - low) * weight if weight < 0.5 else high - (high - low) * (1 - weight)
