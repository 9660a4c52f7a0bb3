"""Stop rules by kind. A new one is a file (settings and rule) and a line here; recipes and contract tests pick it up.

From outside the package the line is `STOP_RULES["mine"] = MyRule`, before the recipe is read.
"""

from __future__ import annotations

from katds.core.stop.base import StopRule
from katds.core.stop.first_of import FirstOfRule
from katds.core.stop.kat import KatRule
from katds.core.stop.repetition import RepetitionRule
from katds.core.stop.replay import ReplayRule
from katds.core.stop.simple import NeverRule, PrefixRule, RandomRule

STOP_RULES: dict[str, type[StopRule]] = {
    "kat": KatRule,
    "never": NeverRule,
    "prefix": PrefixRule,
    "random": RandomRule,
    "replay": ReplayRule,
    "repetition": RepetitionRule,
    "first_of": FirstOfRule,
}
