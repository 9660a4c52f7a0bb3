"""The benchmarks run: every sub-benchmark at toy size, through the command that users call."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from messages import refused

from katds.bench import report
from katds.bench.floors import _between
from katds.bench.report import Result, claim, save, show
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
    assert "is skipped" not in done.stderr
    for name in SUBS:
        assert f"smoke: {name} took" in done.stderr and f"\n{name}: " in "\n" + done.stdout


def test_help_is_quick_and_names_them_all() -> None:
    done = bench("--help")
    assert done.returncode == 0 and all(f"\n    {name}" in done.stdout for name in SUBS)


@pytest.fixture
def launched() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launched_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def subs(launched: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """One sub-benchmark that measures one row, in a launcher whose default folder is tmp_path / "results"."""
    launched.RESULTS = tmp_path / "results"
    found = Result("x", "why?", [{"a": 1}])
    return {"x": SimpleNamespace(HELP="", SMOKE=[], options=lambda parser: None, run=lambda options: found)}


@pytest.mark.parametrize(
    "arguments",
    [
        "packing --draws 0", "packing --ranks 0", "packing --rollouts 0", "threshold --ranks 0", "threshold --modelled 0",
        "threshold --repetitions 0", "threshold --rollouts -1", "peers --steps 0", "peers --ranks 0", "savings --steps 0",
        "savings --ranks x", "savings --demo-steps 0", "loss --device tpu", "loss --repetitions 0", "loss --threads 0",
        "loss --cases 0,8,8,float32,tied", "loss --cases x,8,8,float32,tied", "loss --cases 64,8,8,float32,tied",
    ],
)  # fmt: skip
def test_wrong_numbers_are_refused(arguments: str, launched: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    subs = {name: importlib.import_module(f"katds.bench.{name}") for name in SUBS}
    with pytest.raises(SystemExit) as ended:
        launched.command_line(subs).parse_args(arguments.split())
    assert ended.value.code == 2 and arguments.split()[1] in capsys.readouterr().err


def test_what_is_measured_is_written_before_it_is_shown(
    launched: ModuleType, subs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(result: Result) -> str:
        raise ModuleNotFoundError

    monkeypatch.setattr(report, "show", broken)
    with pytest.raises(ModuleNotFoundError):
        launched.measure(subs, argparse.Namespace(sub="x"))
    assert json.loads((launched.RESULTS / "x.json").read_text())["rows"] == [{"a": 1}]


@pytest.mark.parametrize("toy", [{"toy": True}, {"shapes": ["tiny", "smoke"]}])
def test_a_toy_run_leaves_the_results_alone(
    toy: dict[str, Any], launched: ModuleType, subs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched.measure(subs, argparse.Namespace(sub="x", **toy))
    assert "not written" in capsys.readouterr().out and not launched.RESULTS.exists()
    launched.measure(subs, argparse.Namespace(sub="x", out=tmp_path / "elsewhere", **toy))
    assert (tmp_path / "elsewhere" / "x.json").exists() and not launched.RESULTS.exists()


def test_results_go_beside_the_launcher(launched: ModuleType) -> None:
    assert launched.RESULTS == ROOT / "launch" / "bench_results"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_measurement(
    launched: ModuleType, subs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    subs["x"].run = lambda options: pytest.fail("it was measured")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(lambda out=out: launched.measure(subs, argparse.Namespace(sub="x", out=out)), "--out", str(out))  # type: ignore[misc]
    claim(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_an_empty_table_replaces_nothing(tmp_path: Path) -> None:
    save(Result("x", "why?", [{"a": 1}]), tmp_path)
    refused(lambda: save(Result("x", "why?", []), tmp_path), "bench x")
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"a": 1}]


def test_smoke_goes_on_where_a_package_is_missing(
    launched: ModuleType, subs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    absent = SimpleNamespace(**vars(subs["x"]) | {"NEEDS": ("no_such_package",)})
    both = {"absent": absent, **subs}
    launched.smoke(both, launched.command_line(both))
    said = capsys.readouterr().err
    assert "x took" in said and "absent took" not in said
    assert "absent is skipped, no_such_package is not installed. Run: pip install" in said
    refused(lambda: launched.measure(both, argparse.Namespace(sub="absent")), "no_such_package", "pip install")


def test_peers_needs_trl(launched: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "find_spec", lambda name: None)
    peers = importlib.import_module("katds.bench.peers")
    refused(lambda: launched.measure({"peers": peers}, argparse.Namespace(sub="peers")), "tabulate, trl", "pip install")


def test_contenders_take_turns_and_ratios_are_paired() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    taken = alternate(runs, repetitions=2, warmup=1, settle=lambda: order.append("-"))
    assert "".join(order) == "-a--b-" * 3 and [len(seconds) for seconds in taken.values()] == [2, 2]
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == spread([2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)


def test_the_clock_stops_after_the_device_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    taken = alternate({"a": lambda: next(clock)}, repetitions=1, warmup=1, settle=lambda: next(clock))
    # Start, run, settle, stop: what the first settle takes does not count.
    assert taken == {"a": [3.0]}


def test_a_result_says_how_it_came_about(tmp_path: Path) -> None:
    result = Result("x", "why?", [{"a": 1.23456, "b": "c"}], [{"seconds": 1.0}], {"seed": 1}, ["a note"])
    assert "| 1.23 | c   |" in show(result) and "- a note" in show(result)
    record = json.loads(save(result, tmp_path).read_text())
    assert record["samples"] == [{"seconds": 1.0}] and record["settings"] == {"seed": 1}
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"] and record["command"].startswith("python ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_record_names_code_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    assert re.fullmatch(f"{head}(-dirty-[0-9a-f]{{8}})?", report.commit())
    if "model name" in (cpuinfo := Path("/proc/cpuinfo")).read_text():
        assert "cpu family" in cpuinfo.read_text() and ", cpu family " in report.machine()["processor"]
        assert ", model " in report.machine()["processor"]
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    assert report.commit() == "unknown"


def test_floors_between_two_sizes_are_interpolated() -> None:
    assert _between({1: 10.0, 5: 30.0}, 3) == 20.0 and _between({1: 10.0, 5: 30.0}, 5) == 30.0
