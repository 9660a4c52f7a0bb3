"""The loss benchmark: contenders agree, those that do not are refused, and memory is that of the contender."""

from __future__ import annotations

import argparse

import pytest
import torch

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
