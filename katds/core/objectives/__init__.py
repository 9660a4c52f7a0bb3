"""Distillation losses by `kind`. A new one is a file (settings and loss) and a line here; recipes and contract tests
pick it up."""

from __future__ import annotations

from katds.core.objectives.base import Objective
from katds.core.objectives.forward_kl import ForwardKl
from katds.core.objectives.jsd import Jsd
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.objectives.reverse_kl import ReverseKl

OBJECTIVES: dict[str, type[Objective]] = {
    "reverse_kl": ReverseKl,
    "forward_kl": ForwardKl,
    "jsd": Jsd,
    "policy_gradient": PolicyGradient,
}

__all__ = ["OBJECTIVES", "Objective"]
