"""`bench gpu` at toy size on a CPU: every part runs, errors become rows, and a machine without a GPU is told so."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from katds.bench import gpu
from katds.bench.gpu import loss, machine, step
from katds.bench.ranks import on_ranks
from katds.errors import ConfigError


def options(*more: str, out: Path | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.options(parser)
    parsed = parser.parse_args([*gpu.SMOKE, *more])
    if out is not None:
        parsed.out = out
    return parsed


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part != "step"])
def test_a_part_runs(part: str, tmp_path: Path) -> None:
    result = gpu.run(options("--parts", part, out=tmp_path))
    assert result.rows and all(set(row) == set(gpu.COLUMNS) for row in result.rows)
    for row in result.rows:
        assert row["part"] == part and row["error"] is None and row["ms"] > 0 and row["tokens/s"] > 0
        assert row["x floor" if part == "decode" else "MFU"] > 0
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert len(saved["rows"]) == len(result.rows) and saved["settings"]["product_flops"] > 0


def test_a_step_runs() -> None:
    """As `step` does, in a process of its own: it joins a world."""
    (row,) = on_ranks(1, step.whole_steps, "smoke", "copy", True, 1, "torch.float32")
    assert row["ms"] > 0 and row["tokens/s"] > 0


def test_a_failing_case_is_a_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Any) -> Iterator[machine.Case]:
        yield "first", lambda: 1 / 0  # type: ignore[dict-item, return-value]
        yield "second", lambda: {"ms": 1.0}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loss, "cases", broken)
    with pytest.raises(RuntimeError, match=r"2 of 4 cases failed.*ZeroDivisionError"):
        gpu.run(options("--parts", "loss", "attention", out=tmp_path))
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["case"], bool(row["error"])) for row in rows[:3]] == [
        ("first", True),
        ("second", False),
        ("set-up", True),
    ]
    assert rows[3]["part"] == "attention" and rows[3]["ms"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_toys() -> None:
    parsed = options()
    parsed.toy = False
    with pytest.raises(ConfigError, match="--toy"):
        gpu.run(parsed)


def test_shapes_are_those_of_qwen3() -> None:
    """Parameters as the model cards count them, embedding included."""
    for name, billions in (("0.6B", 0.6), ("1.7B", 1.72), ("8B", 8.19)):
        config = machine.SHAPES[name].config()
        with torch.device("meta"):
            model = machine.AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_data_sheets_by_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = machine.Bench(torch.device("cuda"), True, 8, 1, 8, 8)
    for name, flops in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert (bench.sheet or (None,))[0] == flops
