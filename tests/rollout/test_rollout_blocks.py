"""Teachers in blocks of ranks score as one that is sharded over the world does, and blocks do not wait for each other."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from rollout_setup import RANDOM, SEED, TOP_K, VOCABULARY, Resident, facts, kat, mixed_requests, prompts
from test_rollout_teachers import NEEDS, routed, rows_by_rollout
from zoo import deepspeed_json, random_model

from katds.core.stop.simple import NeverRule
from katds.core.types import Need, RolloutRequest
from katds.errors import TrainingError
from katds.models.causal import FlatCausalLM
from katds.parallel.world import World, start_world
from katds.parallel.zero import ZeroFrozen, load_frozen
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.rollout.slots import share
from katds.rollout.writer import TeacherPen, teacher_engine

RANKS = 4


def config(offload: str | None = None) -> dict[str, Any]:
    settings = deepspeed_json()
    if offload is not None:
        settings["zero_optimization"]["offload_param"] = {"device": offload}
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers; parameters of the first do not divide by the number of ranks."""
    root = tmp_path_factory.mktemp("teachers")
    for name, options in (("first", {"seed": 2, "hidden": 50}), ("second", {"seed": 9, "hidden": 40, "layers": 1})):
        random_model(**options, **RANDOM).save_pretrained(root / name)
    return root


def written(world: World, teachers: list[ZeroFrozen], requests: list[RolloutRequest], slots: int, overlap: bool) -> Any:
    """Of this rank: rollouts with divergences and signal, and how many rounds."""
    student = FlatCausalLM(random_model(seed=1, attn_implementation="katds", **RANDOM).eval(), VOCABULARY)
    engine = RolloutEngine(
        Resident(student), [teacher.reading for teacher in teachers], kat(None), NEEDS, world.collective,
        EngineSettings(slots, 5, (5, 23), Sampling(), TOP_K, SEED, world.device, overlap=overlap),
        lambda name: nullcontext(), lockstep=world.block(max(teacher.ranks for teacher in teachers)),
    )  # fmt: skip
    batch = engine.generate(requests, 1)
    rows = rows_by_rollout(batch)
    return [
        (fact, r.divergences, {key: value.tolist() for key, value in rows[r.id].items()})
        for fact, r in zip(facts(batch), batch.rollouts, strict=True)
    ], engine.stats.rounds


def rollouts_on_rank(folder: Path, gather: str, overlap: bool) -> list[Any]:
    world = start_world()
    found: list[Any] = []
    for sizes in ((4,), (2,), (1,), (4, 2), (2, 1)):
        teachers = [
            load_frozen(
                folder / name, config(offload=offload), VOCABULARY, gather, world.block(size).group
            )
            for name, size, offload in zip(("first", "second"), sizes, (None, "cpu"), strict=False)
        ]  # fmt: skip
        requests = mixed_requests(audit_every=4)
        # In one slot every forward reads one rollout, whatever its company: nothing is rounded differently.
        found.append(written(world, teachers, routed(requests) if len(sizes) > 1 else requests, 1, overlap)[0])
    return found


@pytest.mark.parametrize(("gather", "overlap"), [("layer", False), ("layer", True), ("phase", False), ("once", False)])
def test_blocks_write_and_score_the_same_rollouts(folder: Path, gather: str, overlap: bool) -> None:
    """Bit for bit: tokens, divergences, signal. One teacher in blocks of 4, 2, and 1; two in blocks of different sizes."""
    ranks = run_ranks(RANKS, rollouts_on_rank, folder, gather, overlap)
    whole, *blocks, two, other = (
        sorted((row for rank in ranks for row in rank[case]), key=lambda row: row[0]) for case in range(5)
    )
    assert len(whole) == len(mixed_requests()) and whole[0][1]
    assert blocks == [whole, whole] and two == other != whole
    assert all(rank[case] for rank in ranks for case in range(3)), "a rank wrote nothing"


def packed_rollouts_on_rank(folder: Path) -> list[Any]:
    world = start_world()
    return [
        written(
            world, [load_frozen(folder / "first", config(), VOCABULARY, "layer", world.block(size).group)],
            mixed_requests(audit_every=4), 3, False,
        )
        for size in (4, 2)
    ]  # fmt: skip


def test_blocks_with_several_slots(folder: Path) -> None:
    """The same rollouts, as equal as float32 is in other company."""
    ranks = run_ranks(RANKS, packed_rollouts_on_rank, folder)
    whole, halves = (
        sorted((row for rank in ranks for row in rank[case][0]), key=lambda row: row[0]) for case in (0, 1)
    )
    assert [row[0] for row in halves] == [row[0] for row in whole]
    for (_, divergences, _), (_, expected, _) in zip(halves, whole, strict=True):
        assert divergences == pytest.approx(expected, abs=1e-4)


class Marking(NeverRule):
    """Leaves a file for every rollout that has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def end(self, request: RolloutRequest, terminated: bool) -> Any:
        (self._folder / str(request.id)).touch()
        return super().end(request, terminated)


def apart_on_rank(folder: Path, marks: Path) -> tuple[int, int]:
    """Block 1 does not decode before block 0 has written all of its rollouts. Returns this rank's rounds and teacher forwards."""
    world = start_world()
    teacher = load_frozen(folder / "first", config(), VOCABULARY, block=world.block(2).group)
    requests = [RolloutRequest(i, p, 32 if i % 2 else 16) for i, p in enumerate(prompts([4, 1, 11, 2, 7, 3]))]
    first, second = share(requests, 2)
    assert {r.max_new_tokens for r in first} == {16} and {r.max_new_tokens for r in second} == {32}

    def clock(part: str) -> Any:
        deadline = time.monotonic() + 20
        while world.rank >= 2 and part == "decode" and not all((marks / str(r.id)).exists() for r in first):
            assert time.monotonic() < deadline, "the first block waits for the second"
            time.sleep(0.01)
        return nullcontext()

    student = FlatCausalLM(random_model(seed=1, attn_implementation="katds", **RANDOM).eval(), VOCABULARY)
    engine = RolloutEngine(
        Resident(student), [teacher.reading], Marking(marks), frozenset({Need.SAMPLED}), world.collective,
        EngineSettings(2, 4, (), Sampling(), TOP_K, SEED, world.device), clock, lockstep=world.block(2),
    )  # fmt: skip
    with mock.patch.object(ZeroFrozen, "__call__", autospec=True, side_effect=ZeroFrozen.__call__) as forward:
        batch = engine.generate(requests, 1)
    assert {r.id for r in batch.rollouts} <= {r.id for r in (first if world.rank < 2 else second)}
    return engine.stats.rounds, forward.call_count


def test_a_block_does_not_wait_for_another(folder: Path, tmp_path: Path) -> None:
    """A block that has finished its phase while the other has not begun to write."""
    assert run_ranks(RANKS, apart_on_rank, folder, tmp_path) == [(4, 4), (4, 4), (8, 8), (8, 8)]


def failing_on_rank(folder: Path, size: int) -> str:
    world = start_world()
    teacher = load_frozen(folder / "first", config(), VOCABULARY, block=world.block(size).group)
    model = random_model(seed=1, attn_implementation="katds", **RANDOM).eval()
    if world.rank == 3:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    engine = RolloutEngine(
        Resident(FlatCausalLM(model, VOCABULARY)), [teacher.reading], kat(None), frozenset(), world.collective,
        EngineSettings(2, 4, (), Sampling(), TOP_K, SEED, world.device), lambda name: nullcontext(), lockstep=world.block(size),
    )  # fmt: skip
    try:
        engine.generate(mixed_requests(), 1)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", [4, 2])
def test_what_is_not_finite_in_a_block_ends_all(folder: Path, size: int) -> None:
    messages = run_ranks(RANKS, failing_on_rank, folder, size)
    assert len(set(messages)) == 1 and messages[0].startswith("The divergence of student and teacher is not a finite")


def writing_on_rank(folder: Path) -> list[Any]:
    world = start_world()
    sizes = EngineSettings(1, 5, (5, 23), Sampling(), TOP_K, SEED, world.device)
    clock = lambda name: nullcontext()  # noqa: E731
    found = []
    for size in (4, 2):
        teacher = load_frozen(folder / "first", config(), VOCABULARY, "phase", world.block(size).group)
        writer = teacher_engine(teacher, False, world.collective, sizes, clock)
        pen = TeacherPen(writer, teacher, world.collective, clock, 512, 0)
        found.append((pen.write([(7, 8, 9), (world.rank + 10, 4)], [9, 9]), pen.embed(torch.tensor([3, 1])).tolist()))
    return found


def test_a_teacher_in_blocks_writes_the_same(folder: Path) -> None:
    for whole, halves in run_ranks(RANKS, writing_on_rank, folder):
        assert whole == halves and all(whole[0])


def test_requests_are_dealt_evenly_and_prompts_stay_together() -> None:
    requests = [replace(r, audit=r.id % 5 == 0) for r in mixed_requests(samples=4)]  # five prompts
    queue = sorted(requests, key=lambda r: not r.audit)
    for parts in (1, 2, 3, 5, 8, 40):
        dealt = share(queue, parts)
        assert sorted(r.id for part in dealt for r in part) == [r.id for r in requests]
        assert max(map(len, dealt)) <= -(-len(requests) // parts)
        assert all([r for r in queue if r in part] == part for part in dealt), "another order"
        audits = [sum(r.audit for r in part) for part in dealt]
        assert max(audits) - min(audits) <= 1
    together = share([r for r in mixed_requests(samples=4) if r.prompt.index != 10], 4)
    assert [len({r.prompt.index for r in part}) for part in together] == [1, 1, 1, 1]
    assert share([], 3) == [[], [], []]
