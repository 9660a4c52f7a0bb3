"""Ranks that share micro-batches by sequence parallelism; the gradients of all objectives are in test_gradients.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from zoo import build_model, build_recipe, deepspeed_json, optimizer

from katds.config import Recipe
from katds.errors import ConfigError
from katds.models.causal import linear
from katds.models.plans import PackedPlan
from katds.parallel.sequence import UlyssesShards, check_shards
from katds.parallel.world import start_world
from katds.parallel.zero import load_student

LENGTHS = [5, 1, 9, 6, 3]  # 24 tokens: stretches end inside of sequences


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    """Whole runs on two ranks: sharing changes what each computes, not what is learnt. KAT, minibatches, micro-batches with nothing in."""
    found = []
    for sharers in (1, 2):
        train = {"sequence_parallel": sharers, "minibatches": 2, "micro_batch_tokens": 40, "steps": 3}
        recipe = build_recipe(tmp_path, f"sharers-{sharers}", train=train, checkpoint={"every": 0, "export": False})
        del recipe["evaluation"]
        run_ranks(2, _train, recipe)
        lines = (tmp_path / "runs" / f"sharers-{sharers}" / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    keys = (
        "loss/total",
        "train/gradient_norm",
        "kat/threshold",
        "rollout/length_mean",
        "rollout/kept_mean",
        "train/tokens",
    )
    for alone, shared in zip(*found, strict=True):
        for key in keys:
            assert shared.get(key) == pytest.approx(alone.get(key), rel=1e-4), key
    assert len(found[0]) == 3 and found[0][0]["train/tokens"] > 0


def _train(recipe: dict[str, Any]) -> None:
    from katds.run import train

    train(Recipe.model_validate(recipe))


@pytest.mark.parametrize("window", [None, 4])
def test_each_token_is_as_it_would_be_alone(tmp_path: Path, window: int | None) -> None:
    """Logits of four ranks, two and two of which share, against one that has the whole row; with a sliding window, too."""
    extra = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    path = build_model(tmp_path, seed=1, **extra)
    (alone,) = run_ranks(1, _logits, path, 1)
    for first, second in zip(*[iter(run_ranks(4, _logits, path, 2))] * 2, strict=True):
        torch.testing.assert_close(torch.tensor(first + second), torch.tensor(alone), rtol=1e-4, atol=1e-4)


def _logits(path: Path, sharers: int) -> list[list[float]]:
    start_world()
    student = load_student(path, deepspeed_json(), 65, optimizer(), checkpointing=False)
    shards = UlyssesShards(sharers) if sharers > 1 else None
    ids, positions = torch.arange(sum(LENGTHS)) % 60, torch.cat([torch.arange(n) for n in LENGTHS])
    part = slice(None) if shards is None else slice(12 * shards.rank, 12 * shards.rank + 12)
    plan = PackedPlan.of(LENGTHS, torch.device("cpu"), shards)
    with torch.no_grad():
        found: torch.Tensor = student.forward(input_ids=ids[part], position_ids=positions[part], plan=plan, head=linear)
    rows: list[list[float]] = found.tolist()
    return rows


@pytest.mark.parametrize(
    ("size", "ranks", "parts"),
    [
        (2, 3, ["train.sequence_parallel is 2", "3 ranks"]),
        (4, 4, ["train.sequence_parallel is 4", "4 query and 2 key heads"]),
    ],
)
def test_what_cannot_be_shared_is_refused(zoo: Path, size: int, ranks: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_shards(size, ranks, zoo / "student")
    for part in parts:
        assert part in str(refused.value)
    check_shards(1, ranks, zoo / "student")
    check_shards(2, 4, zoo / "student")
