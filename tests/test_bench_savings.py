"""The savings benchmark: its rows by hand, and a toy run through the rule."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from katds.bench import savings
from katds.bench.report import save


def records(*steps: tuple[float, float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("step", "rollout", "tokens", "reads"), step, strict=True)) for step in steps]


def test_a_row_by_hand() -> None:
    without = records((10.0, 8.0, 100.0, 200.0), (30.0, 12.0, 300.0, 600.0))
    with_rule = records((6.0, 4.0, 50.0, 120.0), (20.0, 6.0, 50.0, 280.0))
    row = savings._row({"never": without, "half": with_rule})
    assert row["rule"] == "half"
    assert [row[f"{key} saved"] for key in ("tokens", "reads", "rollout", "step")] == [
        "75.0%",
        "50.0%",
        "50.0%",
        "35.0%",
    ]
    # Steps: 50 % and 83.3 % of the tokens saved; 50 % and 50 % of the rollout's time, 40 % and 33.3 % of the step's.
    assert row["rollout time / tokens"] == "0.67 (0.60 .. 1.00)"
    assert row["step time / tokens"] == "0.47 (0.40 .. 0.80)"
    assert row["step s"] == 20.0 and row["with rule s"] == 13.0


def test_a_shape_that_fails_leaves_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([{"never": records((2.0, 1.0, 4.0, 4.0)), "half": records((1.0, 0.5, 2.0, 2.0))}])
    monkeypatch.setattr(savings, "_random", lambda *arguments: next(outcomes))
    parser = argparse.ArgumentParser()
    savings.options(parser)
    options = parser.parse_args(["--shapes", "smoke", "tiny"])
    options.out = tmp_path
    with pytest.raises(StopIteration):
        savings.run(options)
    assert [row["shape"] for row in json.loads((tmp_path / "savings.json").read_text())["rows"]] == ["smoke"]


@pytest.mark.slow
def test_a_toy_run(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    savings.options(parser)
    options = parser.parse_args(savings.SMOKE)
    options.out = tmp_path
    result = savings.run(options)
    (row,) = result.rows
    assert row["shape"] == "smoke" and row["rule"] == "half"
    # 8 rollouts of 16 tokens, which end half-way.
    assert [sample["tokens"] for sample in result.samples] == [8 * 16, 8 * 8]
    assert (options.out / "savings.json").read_text() == save(result, options.out).read_text()
