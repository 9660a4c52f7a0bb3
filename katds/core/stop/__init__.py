"""Stop rules by kind. A new one is a file (settings and rule) and a line here; recipes and contract tests pick it up."""

from __future__ import annotations

from katds.core.stop.base import StopRule
from katds.core.stop.kat import KatRule
from katds.core.stop.simple import NeverRule, PrefixRule, RandomRule

STOP_RULES: dict[str, type[StopRule]] = {
    "kat": KatRule,
    "never": NeverRule,
    "prefix": PrefixRule,
    "random": RandomRule,
}
