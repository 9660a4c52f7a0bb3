"""The demo's models part of the way through their training, where the stop rule has work to do: where a benchmark may begin."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from katds.bench.contest import train_first
from katds.bench.ranks import on_ranks

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "launch" / "recipes" / "demo.yaml"
MODELS = Path("runs/demo-models")  # where launch/prepare_demo.py is told to write them
ZERO3 = REPOSITORY / "ds_configs" / "zero3_fp32.json"


def missing(models: Path) -> str | None:
    """What is to be done where there are no demo models."""
    if (models / "train.jsonl").exists():
        return None
    return f"--demo-models: {models} holds no demo models. Run: python launch/prepare_demo.py --out {models}"


def recipe() -> dict[str, Any]:
    """The demo's, without evaluation."""
    from katds.cli import read_recipe

    read = read_recipe(RECIPE)
    del read["evaluation"]
    return read


def train_student(models: Path, steps: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Trains the student by the demo's recipe; writes it to folder/student and returns the stop rule's state."""
    base = recipe()
    training = base | {
        "run": {"name": "training", "folder": str(folder)},
        "student": {"path": str(models / "student"), "deepspeed": str(ZERO3)},
        "teacher": base["teacher"] | {"path": str(models / "teacher"), "deepspeed": str(ZERO3)},
        "data": base["data"] | {"train": str(models / "train.jsonl")},
    }
    state: dict[str, Any] = on_ranks(ranks, train_first, training, steps, folder / "student")[0]
    return state


def write_prompts(models: Path, count: int, path: Path) -> None:
    """Some of the demo's training prompts, as JSON lines."""
    rows = [json.loads(line) for line in (models / "train.jsonl").read_text().splitlines()]
    with path.open("w") as file:
        for row in random.Random(0).choices(rows, k=count):
            # Messages, or TRL would leave out the chat template.
            file.write(json.dumps(row | {"prompt": [{"role": "user", "content": row["prompt"]}]}) + "\n")
