"""The benchmarks run: every sub-benchmark at toy size, through the command that users call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from katds.bench.floors import _between
from katds.bench.report import Result, save, show
from katds.bench.timing import alternate, ratio, spread

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "launch" / "bench.py"
SUBS = ("peers", "phases", "savings", "loss", "packing", "threshold", "gpu")


def bench(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_smoke_runs_all_of_them() -> None:
    done = bench("smoke", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in SUBS:
        assert f"smoke: {name} took" in done.stderr and f"\n{name}: " in "\n" + done.stdout


def test_help_is_quick_and_names_them_all() -> None:
    done = bench("--help")
    assert done.returncode == 0 and all(f"\n    {name}" in done.stdout for name in SUBS)


def test_contenders_take_turns_and_ratios_are_paired() -> None:
    order: list[str] = []
    taken = alternate({name: lambda name=name: order.append(name) for name in "ab"}, repetitions=2, warmup=1)
    assert order == list("ababab") and [len(seconds) for seconds in taken.values()] == [2, 2]
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == spread([2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)


def test_a_result_says_how_it_came_about(tmp_path: Path) -> None:
    result = Result("x", "why?", [{"a": 1.23456, "b": "c"}], [{"seconds": 1.0}], {"seed": 1}, ["a note"])
    assert "| 1.23 | c   |" in show(result) and "- a note" in show(result)
    record = json.loads(save(result, tmp_path).read_text())
    assert record["samples"] == [{"seconds": 1.0}] and record["settings"] == {"seed": 1}
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"] and record["command"].startswith("python ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_floors_between_two_sizes_are_interpolated() -> None:
    assert _between({1: 10.0, 5: 30.0}, 3) == 20.0 and _between({1: 10.0, 5: 30.0}, 5) == 30.0
