"""Distillation losses by `kind`. A new one is a file with a class and its factory, and a line below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from katds.core.objectives import forward_kl, jsd, policy_gradient, reverse_kl
from katds.core.objectives.base import Objective

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "reverse_kl": reverse_kl.build,
    "forward_kl": forward_kl.build,
    "jsd": jsd.build,
    "policy_gradient": policy_gradient.build,
}
"""kind -> factory; the factory takes the settings of the recipe's `objective` section, read by attribute."""

__all__ = ["OBJECTIVES", "Objective"]
