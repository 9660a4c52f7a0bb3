"""The loss benchmark: contenders agree, those that do not are refused, and memory is that of the contender."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from messages import refused

from katds.bench import loss
from katds.bench.loss.contenders import TOLERANCE, Case, contenders, disagreement, make_inputs
from katds.bench.loss.memory import peak_bytes

torch.set_num_threads(1)


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("support", ["top-k", "full"])
def test_contenders_agree(support: str, dtype: str, head: str) -> None:
    inputs = make_inputs(Case(700, 32, 48, dtype, head), torch.device("cpu"))
    apart = disagreement(contenders(inputs, support, liger_chunk=16), inputs, dtype)
    assert apart > 0 and inputs.weight.grad is not None  # rounding: something was compared


def test_a_contender_that_computes_something_else_is_refused() -> None:
    inputs = make_inputs(Case(128, 16, 8, "float32", "untied"), torch.device("cpu"))
    runs = {
        "katds": contenders(inputs, "full", liger_chunk=8)["katds"],
        "top-k": contenders(inputs, "top-k", liger_chunk=8)["plain"],
    }
    with pytest.raises(RuntimeError, match="katds and top-k differ in loss"):
        disagreement(runs, inputs, "float32")


def test_memory_is_the_peak_of_the_run_alone() -> None:
    inputs = make_inputs(Case(64, 8, 4, "float32", "untied"), torch.device("cpu"))
    mebibytes = 64

    def hungry() -> torch.Tensor:
        torch.ones(mebibytes * 2**18)  # gone at once
        return torch.zeros(())

    # Two in a row: a child leaves nothing behind. Some MiB of slack for what Python and torch load.
    for _ in range(2):
        assert mebibytes <= peak_bytes(hungry, inputs) / 2**20 <= mebibytes + 16


def test_a_toy_run_fills_the_table() -> None:
    parser = argparse.ArgumentParser()
    loss.options(parser)
    result = loss.run(parser.parse_args([*loss.SMOKE, "--supports", "top-k"]))
    assert [row["support"] for row in result.rows] == ["top-k"]
    assert all(row["katds ms"] > 0 and row["plain MiB"] > 0 for row in result.rows)


def test_a_malformed_case_is_refused() -> None:
    for text in ("1,2,3", "1,2,3,float16,tied", "1,2,3,float32,loose"):
        with pytest.raises(argparse.ArgumentTypeError, match="V,H,T"):
            Case.parse(text)
    for text in ("0,8,8,float32,tied", "x,8,8,float32,tied", "128,8,-1,float32,tied", "64,8,8,float32,tied"):
        with pytest.raises(argparse.ArgumentTypeError):
            Case.parse(text)
    assert Case.parse("65,8,4,bfloat16,untied") == Case(65, 8, 4, "bfloat16", "untied")


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    loss.options(parser)
    refused(lambda: loss.run(parser.parse_args([*loss.SMOKE, "--device", "cuda"])), "--device is cuda", "--device cpu")


def test_default_cases_show_what_memory_depends_on() -> None:
    cases = [Case.parse(text) for text in loss.CASES]
    for vocabulary in (32768, 151936):
        own = [case for case in cases if case.vocabulary == vocabulary]
        assert {case.head for case in own} == {"tied", "untied"} and {case.tokens for case in own} == {512, 1024}
        assert len({case.dtype for case in own}) == 1


def test_a_case_that_fails_leaves_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = iter([1e-6])
    monkeypatch.setattr("katds.bench.loss.contenders.disagreement", lambda *arguments: next(apart))
    parser = argparse.ArgumentParser()
    loss.options(parser)
    case = loss.SMOKE[1]
    options = parser.parse_args(["--cases", case, case, "--supports", "full", "--repetitions", "1"])
    options.out = tmp_path
    with pytest.raises(StopIteration):
        loss.run(options)
    assert len(json.loads((tmp_path / "loss.json").read_text())["rows"]) == 1


def test_a_row_compares_katds_with_the_fastest_other() -> None:
    seconds = {"katds": [0.1, 0.4, 0.3], "plain": [0.2, 0.2, 0.2], "liger": [0.3, 0.1, 9.0]}
    row = loss._row(seconds, {"katds": 2**20, "plain": 3 * 2**20, "liger": 2 * 2**20}, apart=1.23e-6)
    assert row["fastest"] == "plain"  # by the median, not the least
    assert row["katds / fastest"] == "1.50 (0.50 .. 2.00)"
    assert (row["katds ms"], row["plain ms"], row["liger ms"]) == (300.0, 200.0, 300.0)
    assert (row["katds MiB"], row["plain MiB"], row["liger MiB"]) == (1, 3, 2)
    assert row["difference"] == 1.2e-6
