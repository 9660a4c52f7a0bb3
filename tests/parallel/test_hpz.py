"""ZeRO++'s hpZ (zero_hpz_partition_size): a second set of shards in the node. Where weights come from changes no bit of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from ranks import run_ranks
from test_view import VOCABULARY, learn, packed, plain_logits
from zoo import build_model, deepspeed_json, optimizer

from katds.core.collective import Collective
from katds.errors import ConfigError
from katds.parallel import checkpoint
from katds.parallel.shards import check_hpz
from katds.parallel.world import start_world
from katds.parallel.zero import ZeroStudent, load_frozen, load_student

RANKS = 4


def config(hpz: int) -> dict[str, Any]:
    """Weights are let go of after each use, so that the backward gathers them again."""
    settings = deepspeed_json()
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    if hpz:
        settings["zero_optimization"]["zero_hpz_partition_size"] = hpz
    return settings


def bits(student: ZeroStudent) -> dict[str, Any]:
    with student.decoding() as model:
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


class _Recipe:
    """Not what this test is about."""


def trained(path: Path, root: Path, hpz: int, keep_copy: bool) -> tuple[list[Any], dict[int, int]]:
    """What this rank decodes with after each of three updates, after the first is loaded again, and after another; and how many gathers
    of the updates went to so many ranks."""
    collective: Collective = start_world().collective
    student = load_student(path, config(hpz), VOCABULARY, optimizer(), checkpointing=False, keep_copy=keep_copy)
    store = checkpoint.CheckpointStore(root / f"hpz-{hpz}", student.engine, collective, 2, _Recipe(), dict)  # type: ignore[arg-type]
    seen, groups = [bits(student)], Counter[int]()
    gather = partition_parameters._dist_allgather_fn

    def counted(shard: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        groups[group.size()] += 1
        return gather(shard, whole, group)

    for step in range(3):
        with mock.patch.object(partition_parameters, "_dist_allgather_fn", counted):
            learn(student)
        seen.append(bits(student))
        if step == 0:
            with mock.patch("katds.parallel.checkpoint.dump_recipe", return_value=""):
                store.save(1)
    checkpoint.load(student, checkpoint.find_newest(store.folder), collective)
    seen.append(bits(student))
    learn(student)
    return [*seen, bits(student)], dict(groups)


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("keep_copy", [False, True])
def test_training_and_resuming(tmp_path: Path, keep_copy: bool) -> None:
    """With and without: the same weights after every update, decoded from the view or from the copy."""
    path = build_model(tmp_path / "student", seed=1, tied=keep_copy, vocabulary=71, layers=3)
    plain, within = (run_ranks(RANKS, trained, path, tmp_path, hpz, keep_copy) for hpz in (0, 2))
    for (expected, everywhere), (seen, groups) in zip(plain, within, strict=True):
        assert all(map(same, seen, expected)) and not same(expected[0], expected[1])
        assert same(seen[4], seen[1]) and same(seen[5], seen[2])
        assert everywhere.keys() == {RANKS} and groups.keys() == {RANKS, 2}, (everywhere, groups)


def scored(path: Path, hpz: int) -> Any:
    """A student and two teachers in one process; the logits of the second through its engine and through its view."""
    start_world()
    load_student(path, config(hpz), VOCABULARY, optimizer(), checkpointing=False)
    load_frozen(path, config(hpz), VOCABULARY)
    teacher = load_frozen(path, config(hpz), VOCABULARY, "phase")
    logits = [teacher(**packed()).numpy() for _ in range(3)]
    with teacher.reading() as model:
        logits.append(model(**packed()).numpy())
    return logits


def test_a_teacher_reads_the_same(tmp_path: Path) -> None:
    path = build_model(tmp_path / "teacher", seed=5, vocabulary=71)
    plain, within = (run_ranks(RANKS, scored, path, hpz) for hpz in (0, 2))
    expected = plain_logits(path)
    for one, two in zip(plain, within, strict=True):
        for mine, theirs in zip(one, two, strict=True):
            assert (mine == theirs).all() and torch.allclose(torch.from_numpy(theirs), expected, atol=2e-5)


def test_what_does_not_fit_is_said() -> None:
    for hpz, ranks in ((0, 4), (1, 3), (2, 4), (8, 4), (8, 16)):
        check_hpz(config(hpz), ranks, "student")
    check_hpz(config(0), 4, "teacher", "node")
    for wrong, ranks in ((3, 4), (4, 6), ("2", 4)):
        with pytest.raises(
            ConfigError,
            match=f"student.deepspeed: zero_hpz_partition_size is {wrong!r}, which does not divide the {ranks}",
        ):
            check_hpz(config(wrong), ranks, "student")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"but teacher.shard is node: .* remove one of the two"):
        check_hpz(config(2), 4, "teacher", "node")
