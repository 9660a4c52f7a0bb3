"""Graders: is a response's final answer the reference answer? A grader never raises; what it cannot read is wrong."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from katds.errors import ConfigError, first_sentence
from katds.sections import GraderConfig, MatchGraderConfig, MathGraderConfig

Grader = Callable[[str, str], bool]
"""(response, reference answer) -> right or wrong."""

TIMEOUT_SECONDS = 5
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w|\.\d)")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def make_grader(config: GraderConfig) -> Grader:
    """The grader of a recipe. Raises ConfigError for a pattern without a group, or if math-verify is not installed."""
    return MAKERS[type(config)](config)


def normalise(answer: str) -> str:
    """Blanks collapsed, enclosing $ and final full stops dropped, 1,000 written as 1000."""
    text = " ".join(answer.split()).rstrip("$. ").lstrip("$ ")
    return text.replace(",", "") if THOUSANDS.fullmatch(text) else text


def scientific(text: str) -> str:
    """4.5e33, which math-verify does not read as a number, written as 4.5 \\times 10^{33}."""
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _match_grader(config: MatchGraderConfig) -> Grader:
    field = "evaluation.grader.pattern"
    try:
        pattern = re.compile(config.pattern)
    except re.error as error:
        raise ConfigError(
            f"{field} is {config.pattern!r}, not a regular expression ({first_sentence(error)}). Correct it."
        ) from None
    if pattern.groups < 1:
        raise ConfigError(f"{field} is {config.pattern!r} and has no group. Put the answer's part in parentheses.")

    def grade(response: str, answer: str) -> bool:
        found = [match[1] for match in pattern.finditer(response)]
        return bool(found) and found[-1] is not None and normalise(found[-1]) == normalise(answer)

    return grade


def _math_grader(config: MathGraderConfig) -> Grader:
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        raise ConfigError(
            "evaluation.grader.kind is 'math', but math-verify is not installed. Run: pip install 'katds[eval]'"
        ) from None
    same_text = _match_grader(MatchGraderConfig())  # cheap, and right for answers that are no mathematics

    def grade(response: str, answer: str) -> bool:
        if same_text(response, answer):
            return True
        # math-verify interrupts itself by SIGALRM, which only the main thread may set.
        seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
        try:
            gold = parse(f"\\boxed{{{scientific(normalise(answer))}}}", parsing_timeout=seconds)
            return bool(verify(gold, parse(scientific(response), parsing_timeout=seconds), timeout_seconds=seconds))
        except (Exception, TimeoutException):  # the latter is a BaseException
            return False

    return grade


MAKERS: Mapping[type, Callable[[Any], Grader]] = {MatchGraderConfig: _match_grader, MathGraderConfig: _math_grader}
