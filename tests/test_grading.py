"""Graders: right, wrong, unreadable, and recipes that cannot work."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import refused

from katds.data import grading
from katds.data.grading import make_grader, normalise
from katds.sections import MatchGraderConfig, MathGraderConfig

BOXED = make_grader(MatchGraderConfig())


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so \boxed{42}", "42", True),
        (r"first \boxed{41}, no: \boxed{42}", "42", True),
        (r"first \boxed{42}, no: \boxed{41}", "42", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{ 1,000 }", "1000", True),
        (r"\boxed{$x$.}", "x", True),
        (r"\boxed{1,2}", "12", False),
        (r"\boxed{a}", "A", False),
        ("42", "42", False),
        (r"\boxed{42", "42", False),
        ("", "42", False),
    ],
)
def test_match_compares_the_last_group(response: str, answer: str, right: bool) -> None:
    assert BOXED(response, answer) is right


def test_match_with_a_pattern_of_its_own() -> None:
    grade = make_grader(MatchGraderConfig(pattern=r"!\s*(\d+)|(never)"))
    assert grade("! 3 ! 7", "7") and not grade("! 7 ! 3", "7")
    assert not grade("! 7 never", "7")  # the last match has no first group


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(f" ${normalise(text)}$\n") == normalise(text)


def test_patterns_that_cannot_work_are_refused_at_once() -> None:
    refused(lambda: make_grader(MatchGraderConfig(pattern="x+")), "evaluation.grader.pattern", "'x+'", "no group")
    refused(
        lambda: make_grader(MatchGraderConfig(pattern="(x")), "evaluation.grader.pattern", "not a regular expression"
    )


def test_math_without_its_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    refused(lambda: make_grader(MathGraderConfig()), "evaluation.grader.kind", "pip install 'katds[eval]'")


MATH = [
    (r"so \boxed{\frac{1}{2}}", "0.5", True),
    (r"so \boxed{\frac{1}{2}}", "0.25", False),
    (r"\boxed{x+1}", "$1+x$", True),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    (r"\boxed{(1, 2)}", "(1,2)", True),
    (r"\boxed{(2, 1)}", "(1,2)", False),
    (r"\boxed{a red car}", "a red car", True),
    # Reference answers as the benchmarks write them: AIME with zeros, AMC as floats, MATH in LaTeX, MinervaMath with exponents.
    (r"\boxed{33}", "033", True),
    (r"\boxed{27}", "27.0", True),
    (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True),
    (r"\boxed{11,111,111,100}", r"11,\! 111,\! 111,\! 100", True),
    (r"\boxed{4.0 \times 10^{33}}", "4e33", True),
    (r"\boxed{4 \times 10^{32}}", "4e33", False),
    (r"\boxed{1.6e-19}", r"1.60 \times 10^{-19}", True),
    (r"\boxed{2e}", "2e", True),
    (r"\boxed{\arcsin(1.3\sin\theta_w)}", r"\arcsin{1.3 \sin{\theta_w}}", True),
    ("no answer at all", "5", False),
    ("", "5", False),
    (r"\boxed{", "", False),
    (r"\boxed{\frac{}{}}", r"\frac{", False),
]


@pytest.mark.parametrize(("response", "answer", "right"), MATH)
def test_math_compares_by_value(response: str, answer: str, right: bool) -> None:
    pytest.importorskip("math_verify")
    assert make_grader(MathGraderConfig())(response, answer) is right


def test_math_works_outside_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    found: list[bool] = []
    grade = make_grader(MathGraderConfig())
    thread = threading.Thread(target=lambda: found.append(grade(r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_math_counts_a_timeout_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    math_verify = pytest.importorskip("math_verify")
    from math_verify.errors import TimeoutException

    def hang(*_: object, **__: object) -> bool:
        raise TimeoutException  # a BaseException, which `except Exception` would let through

    monkeypatch.setattr(math_verify, "verify", hang)
    assert make_grader(MathGraderConfig())(r"\boxed{1}", "2") is False


def test_math_gives_up_on_endless_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(grading, "TIMEOUT_SECONDS", 1)
    start = time.monotonic()
    assert make_grader(MathGraderConfig())(r"\boxed{10^{10^{10^{10}}}}", "3") is False
    assert time.monotonic() - start < 5
