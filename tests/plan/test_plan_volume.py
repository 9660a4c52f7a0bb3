"""The bytes that planning says a rank moves, against what real engines move: to the byte, padding included."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_plan_memory import changed
from test_plan_zero import GATHERS, config, learning_loss, shape_of
from traffic import Traffic
from zoo import build_model, build_recipe, deepspeed_json, optimizer

from katds.config import Recipe
from katds.core.packing import plan
from katds.core.types import LENGTH, Field, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.models.causal import linear
from katds.models.plans import PackedPlan
from katds.parallel.sequence import UlyssesShards
from katds.parallel.world import report_traffic, start_world
from katds.parallel.zero import load_student
from katds.plan import volume
from katds.plan.hardware import GPUS
from katds.plan.held import secondary
from katds.plan.job import Job
from katds.plan.lengths import longest
from katds.plan.recorded import prompts
from katds.plan.simulate import simulate
from katds.plan.zero import ZeroSettings, gathered, gathers
from katds.train.share import deal, survey

RANKS = 3  # most parameters do not divide by three
STEADY = 3  # DeepSpeed looks ahead once it has seen two passes
# Of a step, beyond what is predicted: sums of losses and statistics, gradient norms, pickled layouts.
OTHER_BYTES = 4000


def job_of(recipe: Recipe, ranks: int) -> Job:
    return Job.of(recipe, ranks, "cpu", prompts(recipe), longest(recipe), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=1, layers=6, tied=True)


@pytest.mark.parametrize("settings", GATHERS, ids=range(len(GATHERS)))
def test_weights_and_gradients_of_updates(folder: Path, settings: dict[str, int]) -> None:
    """A rollout phase, two micro-batches and an update, with activation checkpointing and without."""
    found = run_ranks(RANKS, _updates, folder, config(**settings))[0]
    shape, zero = shape_of(folder), ZeroSettings.of(config(**settings))
    small = [size for size in shape.sizes if size <= zero.persistent]
    large = [size for size in shape.sizes if size > zero.persistent]

    def moved(sizes: Any) -> int:
        return volume.spread(sizes, 4, RANKS).received

    for measured, order in zip(found, (shape.update_order, shape.checkpointed_order), strict=True):
        passed = gathers(order, zero, RANKS)
        assert measured["view", "_allgather_base_"] == moved(large)
        assert measured["first", "_allgather_base_"] == moved([*passed.sizes, *small])
        assert measured["second", "_allgather_base_"] == moved(passed.sizes)
        assert (
            measured["first", "_reduce_scatter_base_"]
            == measured["second", "_reduce_scatter_base_"]
            == moved(shape.sizes)
        )
        assert measured["update", "_allgather_base_"] == moved(small)
        assert abs(measured["second calls", "_allgather_base_"] - passed.calls) <= 1


def _updates(folder: Path, settings: dict[str, Any]) -> list[Counter[tuple[str, str]]]:
    start_world()
    found = []
    for checkpointing in (False, True):
        student = load_student(folder, settings, 65, optimizer(), checkpointing)
        seen: Counter[tuple[str, str]] = Counter()
        with Traffic() as traffic:
            for _ in range(STEADY):
                seen.clear()
                with student.decoding():
                    _note(seen, "view", traffic)
                for name in ("first", "second"):
                    student.backward(learning_loss(student), last=name == "second")
                    _note(seen, name, traffic)
                student.step(1e-3)
                _note(seen, "update", traffic)
        found.append(seen)
    return found


def _note(seen: Counter[tuple[str, str]], name: str, traffic: Traffic) -> None:
    sizes, calls = traffic.taken()
    for (_, operator, _), size in sizes.items():
        seen[name, operator] += size
    for (_, operator, _), count in calls.items():
        seen[f"{name} calls", operator] += count


WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "phase": {"teacher": {"gather": "phase"}, "objective": {"kind": "reverse_kl", "support": "full"}},
    "prefix": {"teacher": {"gather": "phase"}, "behaviour": {"kind": "teacher_prefix", "lengths": "longest"}},
    "once": {"teacher": {"gather": "once"}, "rollout": {"weights": "copy"}, "train": {"activation_checkpointing": True}},
}  # fmt: skip


@pytest.mark.parametrize(("way", "ranks"), [("layer", 2), ("phase", 4), ("once", 3), ("prefix", 2)])
def test_all_that_a_step_moves(tmp_path: Path, way: str, ranks: int) -> None:
    """Every byte that leaves a real run is in the plan, but for a few kilobytes; phase by phase."""
    raw = build_recipe(tmp_path, way)
    recipe = changed(
        Recipe.model_validate(raw), evaluation={"data": None}, **merged({"train": {"minibatches": 2}}, WAYS[way])
    )
    (steps, *_) = run_ranks(ranks, _steps, recipe.model_dump(mode="json"))
    job = job_of(recipe, ranks)
    (teacher,) = job.teachers
    for measured, rounds, micro_batches in steps[STEADY - 1 :]:
        rollout = volume.student_view(job).received + volume.teacher_phase(job, teacher).received
        assert measured["rollout"] == rollout
        assert measured["rollout/teacher"] == volume.teacher_forward(job, teacher).times(rounds).received
        assert measured["rollout/control"] == volume.round_control(ranks, rounds).received
        first, second = (volume.micro_batch_gathers(job, after_view)[0].received for after_view in (True, False))
        weights = first + (micro_batches - 1) * second
        gradients = volume.reduction(job).times(micro_batches).received
        assert measured["learn/forward"] + measured["learn/backward"] == weights + gradients
        known = (
            rollout
            + weights
            + gradients
            + volume.survey(job, job.per_step).received
            + volume.teacher_head(job).received
        )
        known += measured["rollout/teacher"] + measured["rollout/control"] + 2 * volume.after_update(job).received
        if job.prefixes:  # the writing teacher is gathered for itself
            known += volume.teacher_phase(job, teacher).received + measured["rollout/teacher writes/control"]
        others = sum(measured.values()) - measured["rollouts"] - known
        told = {
            "teacher": "rollout/teacher",
            "control": "rollout/control",
            "student": "rollout",
            "rollouts": "rollouts",
        }
        print(
            f"{way}, {ranks} ranks, bytes of a rank, measured:", {name: measured[phase] for name, phase in told.items()}
        )
        print(
            f"  weights and gradients of {micro_batches} micro-batches {weights + gradients}, predicted to the byte; others {others}"
        )
        assert 0 <= others < OTHER_BYTES, measured


@pytest.mark.parametrize(("gather", "ranks"), [("phase", 2), ("once", 3)])
def test_what_a_teacher_that_writes_for_the_loss_moves(tmp_path: Path, gather: str, ranks: int) -> None:
    """objective.kind topd: the teacher is gathered once more, its embedding for itself; texts travel as Python values."""
    recipe = changed(
        Recipe.model_validate(build_recipe(tmp_path, gather)), evaluation={"data": None}, teacher={"gather": gather},
        objective={"kind": "topd", "budget": 3.0, "horizon": 6}, stop={"kind": "never"}, rollout={"top_p": 1.0},
    )  # fmt: skip
    (steps, *_) = run_ranks(ranks, _futures, recipe.model_dump(mode="json"))
    job = job_of(recipe, ranks)
    (teacher,) = job.teachers
    for measured, states, texts in steps[STEADY - 1 :]:
        assert states > 0
        assert measured["learn/prepare", "_allgather_base_"] == volume.teacher_embedding(job).received
        assert (volume.teacher_embedding(job).received > 0) == (gather == "phase")
        written = measured["learn/prepare/teacher writes", "_allgather_base_"]
        assert written == volume.teacher_phase(job, teacher).received
        told, least = measured["learn/prepare", "allgather_"], volume.texts(job, texts).received
        assert least < told < 2 * least + OTHER_BYTES
    step = simulate(job, GPUS["h100"], *job.drawn)
    assert step.flows.get("learn: teacher's embedding", volume.Flow()) == volume.teacher_embedding(job)


def _futures(recipe: dict[str, Any]) -> list[tuple[Counter[tuple[str, str]], int, float]]:
    """By phase and operator; states that were compared, and tokens of all ranks' texts, read and then told."""
    from katds.run import open_run

    run = open_run(Recipe.model_validate(recipe))
    found = []
    with Traffic(lambda: "/".join(run.monitor.clock._path)) as traffic:
        for step in range(STEADY + 1):
            run.trainer.step(step)
            measured: Counter[tuple[str, str]] = Counter()
            for (phase, operator, _), size in traffic.taken()[0].items():
                measured[phase, operator] += size
            last = run.monitor.last
            states, spent = int(last["topd/states"]), last["topd/spent"] * last["rollout/kept_mean"] * 12
            found.append((measured, states, 2 * spent - last["topd/teacher_tokens"]))
    return found


def merged(*sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for each in sections:
        for name, values in each.items():
            found[name] = found.get(name, {}) | values
    return found


def _steps(recipe: dict[str, Any]) -> list[tuple[Counter[str], int, int]]:
    """Bytes by phase, and "rollouts": those on their way to the ranks that learn from them."""
    from katds.run import open_run

    run = open_run(Recipe.model_validate(recipe))
    found = []
    with Traffic(lambda: "/".join(run.monitor.clock._path)) as traffic:
        for step in range(STEADY + 1):
            run.trainer.step(step)
            measured: Counter[str] = Counter()
            for (phase, operator, _), size in traffic.taken()[0].items():
                measured["rollouts" if operator == "alltoall_base_" else phase] += size
            stats, micro_batches = run.trainer.engine.stats, run.monitor.last["train/micro_batches"]
            found.append((measured, stats.rounds, int(micro_batches)))
    return found


def test_rollouts_on_their_way(small: Recipe) -> None:
    """Of ragged lengths on three ranks, one of which has written nothing."""
    rows, owners = [5, 0, 9, 1, 7, 3, 2, 8], [0, 1, 1, 0, 0, 1, 0, 1]
    found = run_ranks(RANKS, _dealt, rows, owners)
    chosen = [i for i, count in enumerate(rows) if count]
    taken, held = [rows[i] for i in chosen], [owners[i] for i in chosen]
    packing = plan([1 + count for count in taken], held, RANKS, 12)
    row = 8 + 4 + 2 * 4  # the token, and the two fields below
    assert found == [count * row for count in volume.dealt(taken, held, packing)]
    assert sum(found) > 0
    job = job_of(small, RANKS)
    whole = volume.exchange(job, taken, held, packing).received
    assert whole == sum(volume.dealt(taken, held, packing)) * (8 + job.signal.learnt_bytes) // RANKS


def _dealt(rows: list[int], owners: list[int]) -> int:
    collective = start_world().collective
    requests = [RolloutRequest(i, Prompt(i, (7, 7)), 99) for i in range(len(rows))]
    mine = [i for i, owner in enumerate(owners) if owner == collective.rank]
    ends = [0, *torch.tensor([rows[i] for i in mine]).cumsum(0).tolist()]
    signal = {Field.SAMPLED: torch.zeros(ends[-1]), Field.STUDENT_TOP: torch.zeros(ends[-1], 2)} if mine else {}
    assert all(end - begin == rows[i] for i, (begin, end) in zip(mine, pairwise(ends), strict=True))
    batch = RolloutBatch([Rollout(requests[i], [1] * rows[i], rows[i], LENGTH) for i in mine], signal)
    kept = survey(batch, requests, collective)
    with Traffic() as traffic:
        deal(batch, requests, kept, range(len(rows)), 12, 0.0, collective, torch.device("cpu"))
        found, _ = traffic.taken()
    return sum(size for (_, operator, _), size in found.items() if operator == "alltoall_base_")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_of_a_shared_micro_batch(small: Recipe, checkpointing: bool) -> None:
    ranks, tokens = 2, 11
    train = {"sequence_parallel": ranks, "activation_checkpointing": checkpointing}
    job = job_of(changed(small, train=train), ranks)
    for found in run_ranks(ranks, _shared, small.student.path, tokens, checkpointing):
        assert found == volume.attention(job, tokens).received > 0
    assert volume.attention(job_of(small, ranks), tokens).calls == 0


def _shared(path: Path, tokens: int, checkpointing: bool) -> int:
    world = start_world()
    student = load_student(path, config(), 65, optimizer(), checkpointing)
    shards = UlyssesShards(world.size)
    length = -(-tokens // world.size)
    ids = torch.arange(length * world.rank, length * world.rank + length)
    plan = PackedPlan.of([tokens, length * world.size - tokens], world.device, shards)

    def head(*given: Any) -> torch.Tensor:
        return linear(*given).logsumexp(-1).sum()

    with Traffic() as traffic:
        student.backward(student.forward(input_ids=ids, position_ids=ids, plan=plan, head=head), last=True)
        return sum(size for (_, operator, _), size in traffic.taken()[0].items() if operator == "alltoall_base_")


def test_deepspeeds_own_account_is_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With `comms_logger` in a DeepSpeed file a run ends with its table: bytes that a rank puts into each collective."""
    logged = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    raw = build_recipe(tmp_path, "logged")
    (tmp_path / "zero3.json").write_text(json.dumps(deepspeed_json() | {"comms_logger": logged}))
    for table, seen in run_ranks(2, _logged, raw):
        put = {name: sum(size * count for size, count in rows.items()) for name, rows in table.items()}
        assert put["all_gather_into_tensor"] == seen["_allgather_base_"] > 0  # of two ranks, one's part
        assert put["reduce_scatter_tensor"] == 2 * seen["_reduce_scatter_base_"] > 0  # both parts
    printed = capfd.readouterr().out
    assert "all_gather_into_tensor" in printed and "reduce_scatter_tensor" in printed


def _logged(recipe: dict[str, Any]) -> tuple[dict[str, dict[int, int]], Counter[str]]:
    import deepspeed.comm

    from katds.run import open_run

    run = open_run(Recipe.model_validate(recipe))
    deepspeed.comm.comms_logger.reset_data()  # it began in the middle of loading
    seen: Counter[str] = Counter()
    with Traffic() as traffic:
        run.trainer.step(0)
        for (_, operator, _), size in traffic.taken()[0].items():
            seen[operator] += size
    table = deepspeed.comm.comms_logger.get_raw_data()
    report_traffic()
    return {name: {size: row[0] for size, row in rows.items()} for name, rows in table.items()}, seen


def test_a_copy_in_every_group(folder: Path) -> None:
    """hpZ: after an update the weights come from all ranks once, be it for a rollout phase; then from the group."""
    ranks, settings = 4, config(stage3_param_persistence_threshold=0, zero_hpz_partition_size=2)
    moved, copied = run_ranks(ranks, _grouped, folder, settings)[0]
    shape, zero = shape_of(folder), ZeroSettings.of(settings)
    everywhere, inside = volume.spread(shape.sizes, 4, ranks).received, gathered(shape.sizes, ranks) * 4 // 2
    assert copied == secondary(shape, zero, ranks)[1] == inside
    assert moved["view"] == {ranks: everywhere} and moved["first"] == {2: inside}
    assert moved["after an update"] == {ranks: everywhere} and moved["later"] == {2: inside}
    found = gathers(shape.update_order, zero, ranks)
    assert volume.weights(found, shape, zero, ranks, [], after_step=False)[0].received == inside
    once, again = volume.weights(found, shape, zero, ranks, [], after_step=True)
    assert (once.received, again.received) == (everywhere, 0)


def _grouped(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, dict[int, int]], int]:
    start_world()
    student = load_student(folder, settings, 65, optimizer(), checkpointing=False)
    moved: dict[str, dict[int, int]] = {}

    def note(name: str) -> None:
        taken = traffic.taken()[0].items()
        moved[name] = {size: count for (_, operator, size), count in taken if operator == "_allgather_base_"}

    with Traffic() as traffic:
        for _ in range(STEADY):
            with student.decoding():
                note("view")
            for name in ("first", "after an update"):
                student.backward(learning_loss(student), last=False)
                note(name)
                student.backward(learning_loss(student), last=True)
                note("later")
                copies = [p.ds_secondary_tensor for p in student.engine.module.parameters()]
                copied = sum(copy.nbytes for copy in copies)
                student.step(1e-3)
    return moved, copied
