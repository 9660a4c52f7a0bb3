"""The learning rate as a pure function of the optimizer step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_with_warmup(
    peak: float, total_steps: int, warmup_fraction: float, final_fraction: float
) -> Callable[[int], float]:
    """Linear rise over the first warmup_fraction of total_steps, then a half cosine down to final_fraction x peak.

    Step 0 already learns (rate peak / warmup steps); steps beyond the end keep the final rate.
    """
    warmup = round(warmup_fraction * total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))

    return rate
