"""`katds.run.train` on forked ranks, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from safetensors.torch import load_file
from zoo import build_recipe, once

from katds import run
from katds.config import Recipe
from katds.train.monitor import Monitor


def train(size: int, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The run on `size` ranks; what each rank saw."""
    return run_ranks(size, _on_rank, recipe)


def _on_rank(recipe: dict[str, Any]) -> dict[str, Any]:
    """Every rank's stop metrics by step, floats as hexadecimal text: to the last bit."""
    seen: dict[str, Any] = {}
    record = Monitor.step

    def step(self: Monitor, step: int, sums: Any, metrics: Any, learned: Any, samples: Any) -> None:
        seen[str(step)] = {
            "kat": {key: float(value).hex() for key, value in metrics.items() if key.startswith("kat/")},
            "rollouts": {r.id: [r.response_ids, r.kept, r.reason] for r in samples},
        }
        record(self, step, sums, metrics, learned, samples)

    Monitor.step = step  # type: ignore[method-assign]
    run.train(Recipe.model_validate(recipe))
    return seen


def full_run(base: Path, size: int) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of an uninterrupted run on `size` ranks, made once per session, and what its ranks saw."""
    recipe = once(base, "recipe", lambda: build_recipe(base, "any"))
    recipe["run"]["name"] = f"full-{size}"
    return base / "runs" / f"full-{size}", once(base, f"full-{size}", lambda: train(size, recipe))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith(("time/", "throughput/", "memory/"))}


def rankless(record: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the number of ranks: time, and how rollouts were packed."""
    return {
        key: value for key, value in timeless(record).items() if key not in ("train/micro_batches", "train/imbalance")
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")
