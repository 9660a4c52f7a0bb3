"""How something goes from one value to another over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine"]


def progressed(share: float, schedule: Schedule) -> float:
    """How far it has come, 0 .. 1, after this share of the steps, 0 .. 1: by equal steps, or along half a cosine."""
    return (1.0 - math.cos(math.pi * share)) / 2.0 if schedule == "cosine" else share
