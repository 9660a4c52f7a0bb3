"""Task rewards: what a finished response is worth, by the grader or by a Python callable of the user's.

Only rollouts that no stop rule has ended have a reward. Under a rule that ends nearly all of them, such as a short `prefix`, reward.weight
changes next to nothing: how many ended by themselves is in stop/eos and stop/length, and `reward/mean` is missing from a step without any.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from katds.data.grading import Grader
from katds.errors import ConfigError, KatdsError, first_sentence

Reward = Callable[[str, str, str | None], float]
"""(prompt, response, reference answer or None) -> reward."""


def graded(grade: Grader) -> Reward:
    """1 for a right answer, else 0."""
    return lambda prompt, response, answer: float(answer is not None and grade(response, answer))


def load_reward(name: str) -> Reward:
    """The callable `package.module:function`, looked for beside the installed packages in the current folder.

    Raises ConfigError where there is none. What it raises or returns later is checked at every call: KatdsError.
    """
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # a user's module raises what it likes
        raise ConfigError(
            f"reward.function is {name!r}, which cannot be imported from {Path.cwd()} ({first_sentence(error)}). Give "
            "module:function, with the module in this folder or installed."
        ) from None
    if not callable(function):
        raise ConfigError(f"reward.function is {name!r}, which is no function. Give module:function.")

    def reward(prompt: str, response: str, answer: str | None) -> float:
        try:
            value = float(function(prompt, response, answer))
        except Exception as error:
            raise KatdsError(
                f"reward.function {name} failed ({type(error).__name__}: {first_sentence(error)}) on the response "
                f"{response[:80]!r}. It takes (prompt, response, answer or None) and returns a number."
            ) from error
        if not math.isfinite(value):
            raise KatdsError(
                f"reward.function {name} returned {value} for the response {response[:80]!r}. Return a finite number."
            )
        return value

    return reward
