"""Stop rules by kind. A new one is a file with a class that has `from_settings`, and a line here.

`tests/core/test_stop_contract.py` picks it up.
"""

from __future__ import annotations

from typing import Any, Protocol

from katds.core.stop.base import StopRule
from katds.core.stop.kat import KatRule, Source
from katds.core.stop.simple import NeverRule, PrefixRule, RandomRule


class StopRuleFactory(Protocol):
    """Makes a rule from its section of the recipe (read by attribute: core knows no config), the run's seed, and the
    resolved source of KAT's threshold (never `auto`)."""

    def __call__(self, settings: Any, seed: int, source: Source) -> StopRule: ...


STOP_RULES: dict[str, StopRuleFactory] = {
    "kat": KatRule.from_settings,
    "never": NeverRule.from_settings,
    "prefix": PrefixRule.from_settings,
    "random": RandomRule.from_settings,
}
