"""What a run over several hosts is compared with: the same run on one host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from whole_runs import full_run, rankless, records, timeless, weights

LOST_AFTER = 8


def assert_is_that_on_one_host(base: Path, run: Path, ranks: int) -> None:
    full, _ = full_run(base, ranks)
    assert_same(full, run, ranks)


def assert_same(full: Path, run: Path, ranks: int) -> None:
    """Bit for bit: rollouts, losses, thresholds, weights."""
    assert json.loads((run / "summary.json").read_text())["ranks"] == ranks
    assert [timeless(record) for record in records(run)] == [timeless(record) for record in records(full)]
    for file in sorted((full / "rollouts").iterdir()):
        assert (run / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert all((value == weights(full)[name]).all() for name, value in weights(run).items())


def losing_recipe(base: Path, folder: Path) -> dict[str, Any]:
    """That of the whole runs; saved after every step, so that there is a middle."""
    full_run(base, 2)
    recipe: dict[str, Any] = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": "run", "folder": str(folder), "lost_after_seconds": LOST_AFTER, "resume": "auto"}
    recipe["checkpoint"] = {"every": 1}
    return recipe


def assert_is_alike(base: Path, run: Path, ranks: int, of: int = 2) -> None:
    """A run that has ended on `ranks` ranks, perhaps begun on others, and the uninterrupted one on `of`: the same rollouts, numbers up to
    rounding."""
    full, _ = full_run(base, of)
    assert json.loads((run / "summary.json").read_text())["ranks"] == ranks
    for one, two in zip(records(run), records(full), strict=True):
        assert rankless(one) == pytest.approx(rankless(two), rel=1e-4)
    for file in sorted((full / "rollouts").iterdir()):
        # Samples are rank 0's, which has others where there are more ranks, or where its host's share of the prompts was dealt beforehand.
        mine, theirs = (_responses(folder / "rollouts" / file.name) for folder in (run, full))
        both = mine.keys() & theirs.keys()
        assert both and all(mine[each] == theirs[each] for each in both)
    for name, value in weights(full).items():
        assert (weights(run)[name] - value).abs().max() < 1e-6, name


def _responses(file: Path) -> dict[int, str]:
    return {row["id"]: row["response"] for row in map(json.loads, file.read_text().splitlines())}
