"""Comparisons of tiny models, for tests."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import yaml
from ranks import run_ranks
from zoo import build_recipe

from katds import run
from katds.cli import load_recipe
from katds.compare.running import Launch


def comparison_file(root: Path, cells: dict[str, Any], name: str = "comparison", **more: Any) -> Path:
    """A comparison of two-step runs without checkpoints in between, below `root`."""
    recipe = build_recipe(
        root, "base", train={"steps": 2}, checkpoint={"every": 1, "export": False}, evaluation={"every": 0}
    )
    (root / "base.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "recipe": str(root / "base.yaml"),
        "folder": str(root / "all"),
        "seeds": [0, 1],
        "ranks": 1,
        "cells": cells,
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content | more, sort_keys=False))
    return file


def forked(ranks: int, started: list[str]) -> Launch:
    """Trains on forked ranks, which takes a second; `started` hears the names of the runs."""

    def launch(recipe: Path, log: Path) -> int:
        started.append(recipe.stem)
        try:
            run_ranks(ranks, _train, recipe)
        except AssertionError:
            log.write_text(traceback.format_exc())
            return 1
        return 0

    return launch


def _train(recipe: Path) -> None:
    run.train(load_recipe(["--config", str(recipe)], "compare", "A run of a comparison."))


def fake_run(folder: Path, recipe: str, average: float, tokens: int, commit: str | None = "c0", **more: Any) -> None:
    """What a finished run leaves behind, with these figures; two steps of 12 rollouts, of which 4 audit cuts were graded. `commit`: that
    made it; None: nobody has recorded it."""
    folder.mkdir(parents=True)
    if commit is not None:
        (folder.parent / "made").mkdir(exist_ok=True)
        (folder.parent / "made" / f"{folder.name}.jsonl").write_text(json.dumps({"commit": commit, "ranks": 1}) + "\n")
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    state = {"step": 2, "world_size": 1}
    (folder / "checkpoints" / "step-2" / "state.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(recipe)
    summary = {
        "ranks": 1, "device": "x", "rollouts": 24, "before": {"avg@2": 0.1}, "after": {"avg@2": average, "pass@2": 2 * average},
        "length_mean": tokens / 24, "rollout_tokens": tokens, "decoded_tokens": tokens, "kept_tokens": tokens // 2,
        "learned_tokens": tokens // 2,
        "training_seconds": tokens / 100, "terminated_share": 0.25, "false_termination_share": 0.5, "audit_cut_graded": 4,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | more))
    records = [
        {
            "step": step,
            "rollout/length_mean": tokens / 24,
            "rollout/kept_mean": tokens / 48,
            "kat/threshold": 0.4 / (step + 1),
        }
        for step in range(2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
