"""`teacher.shard` in whole runs: who shares the teacher's shards changes nothing but who waits for whom."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_cross_tokenizer import recipe_of as aligned_recipe
from test_cross_tokenizer import rollouts
from whole_runs import full_run, rankless, records, timeless, train, weights
from zoo import build_recipe, shared_folder

from katds.cli import load_recipe
from katds.config import Recipe

RANKS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def assert_alike(folder: Path, full: Path) -> None:
    """Up to the rounding of other micro-batches: what a block has written decides who learns from it."""
    for ours, theirs in zip(records(folder), records(full), strict=True):
        assert rankless(ours) == pytest.approx(rankless(theirs), rel=1e-4)
    for name, value in weights(full).items():
        assert (weights(folder)[name] - value).abs().max() < 1e-6, name


def go_on(recipe: dict[str, Any], full: Path, name: str, **changes: Any) -> Path:
    """The run in `full`, gone on with from the middle."""
    folder = full.parent / name
    shutil.copytree(full, folder)
    for gone in ("final", "checkpoints/step-4"):
        shutil.rmtree(folder / gone)
    (folder / "summary.json").unlink()
    train(RANKS, recipe | {"run": recipe["run"] | {"name": name, "resume": True}} | changes)
    return folder


@pytest.mark.slow
def test_a_run_with_the_teacher_in_blocks(base: Path, tmp_path: Path) -> None:
    """Two blocks of two ranks: the run of a teacher that is sharded over all four, resumed bit for bit, or with other shards."""
    whole, _ = full_run(base, RANKS)
    recipe = build_recipe(base, f"blocks-{tmp_path.name}")
    recipe["teacher"] |= {"shard": 2}
    seen = train(RANKS, recipe)
    assert [[s["kat"] for s in rank.values()] for rank in seen] == [[s["kat"] for s in seen[0].values()]] * RANKS
    halves = base / "runs" / recipe["run"]["name"]
    assert_alike(halves, whole)
    again = go_on(recipe, halves, f"again-{tmp_path.name}")
    assert [timeless(r) for r in records(again)] == [timeless(r) for r in records(halves)]
    assert all(torch.equal(value, weights(halves)[name]) for name, value in weights(again).items())
    teacher = recipe["teacher"] | {"shard": "world"}
    assert_alike(go_on(recipe, halves, f"world-{tmp_path.name}", teacher=teacher), whole)


@pytest.mark.slow
def test_a_run_over_the_whole_vocabulary(tmp_path: Path) -> None:
    """Which gathers the teacher's head for the loss."""
    folders = []
    for shard in ("world", 1):
        recipe = build_recipe(
            tmp_path, f"full-{shard}", objective={"kind": "reverse_kl", "support": "full"}, train={"steps": 2},
            evaluation={"data": None},
        )  # fmt: skip
        recipe["teacher"] |= {"shard": shard}
        train(2, recipe)
        folders.append(tmp_path / "runs" / f"full-{shard}")
    assert_alike(*folders)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_a_run_with_a_teacher_of_another_tokenizer_in_blocks(tmp_path: Path, shard: int) -> None:
    """Each block aligns and scores at its own pace: the rollouts are those of a teacher that all ranks share, and so is what is learnt."""
    seen, folders = [], []
    for each in ("world", shard):
        recipe = aligned_recipe(
            tmp_path, f"aligned-{each}", train={"steps": 3, "minibatches": 2}, checkpoint={"every": 0}
        )
        recipe["teacher"] |= {"shard": each}
        seen.append(train(2 * shard, recipe))
        folders.append(tmp_path / "runs" / recipe["run"]["name"])
    for step in range(3):
        world, blocks = (rollouts(ranks, step) for ranks in seen)
        assert world == blocks and len(world) == 12
    assert any(reason == "kat" for _, _, reason in blocks.values()), "nothing was cut: the test is idle"
    assert_alike(*folders)


def test_ranks_that_do_not_divide_are_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, "three")
    recipe["teacher"] |= {"shard": 3}
    with pytest.raises(
        AssertionError,
        match=r"ConfigError: teacher\.shard is 3, which does not divide the 2 ranks; set it to one of 1, 2",
    ):
        train(2, recipe)
    assert not (tmp_path / "runs").exists()


def test_what_a_recipe_may_say(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, "read")
    for shard in ("world", "node", 1, 16):
        assert Recipe.model_validate(recipe | {"teacher": recipe["teacher"] | {"shard": shard}}).teacher.shard == shard
    for wrong in (0, True, "rank", "2", 1.5):
        with pytest.raises(ValidationError, match="shard"):
            Recipe.model_validate(recipe | {"teacher": recipe["teacher"] | {"shard": wrong}})
    flags = ["--run.name", "x", "--student.path", "s", "--teacher.path", "t", "--data.train", "d"]
    for text, shard in (("node", "node"), ("4", 4)):
        read = load_recipe(["train.py", *flags, "--teacher.shard", text][1:], "train.py", "")
        assert read.teacher.shard == shard
