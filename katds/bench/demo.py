"""The demo's models part of the way through their training, where the stop rule has work to do: where a benchmark may begin."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from katds.bench.contest import train_first
from katds.bench.ranks import on_ranks
from katds.bench.recipes import REPOSITORY, zero3
from katds.bench.report import Result
from katds.errors import ConfigError

RECIPE = REPOSITORY / "launch" / "recipes" / "demo.yaml"
MODELS = Path("runs/demo-models")  # where launch/prepare_demo.py is told to write them
PARTS = ("train.jsonl", "student/config.json", "teacher/config.json")


def missing(models: Path) -> str | None:
    """What is to be done where there are no demo models."""
    absent = [part for part in PARTS if not (models / part).exists()]
    if not absent:
        return None
    return f"--demo-models: {models} has no {absent[0]}, and so no demo models. Run: python launch/prepare_demo.py --out {models}"


def possible(asked: list[str] | None, default: list[str], options: argparse.Namespace, result: Result) -> list[str]:
    """The shapes to measure. Without the demo's models, "demo" is an error where it was asked for, and a note where it was not."""
    shapes = asked or default
    if "demo" not in shapes or not (remedy := missing(options.demo_models)):
        return shapes
    if asked:
        raise ConfigError(remedy)
    result.notes.append(f"Shape demo is left out: {remedy}.")
    return [shape for shape in shapes if shape != "demo"]


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
        "student": {"path": str(models / "student"), "deepspeed": zero3("fp32")},
        "teacher": base["teacher"] | {"path": str(models / "teacher"), "deepspeed": zero3("fp32")},
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
