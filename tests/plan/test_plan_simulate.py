"""Simulated steps: the rounds of the real engine, and arithmetic that can be done by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rollout_setup import TOP_K, Resident, mixed_requests, models

from katds.cli import merge
from katds.config import Recipe
from katds.core.stop.simple import NeverRule
from katds.parallel.world import start_world
from katds.plan.advise import advice
from katds.plan.hardware import GPUS, Profile
from katds.plan.items import LEARN
from katds.plan.job import Job
from katds.plan.lengths import Lengths, Prompts, longest
from katds.plan.memory import memory
from katds.plan.rounds import Rollouts
from katds.plan.simulate import simulate
from katds.plan.zero import ZeroSettings
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.rollout.slots import share

PROFILE = Profile("toy", "cuda", 2**30, 1e9, 1e9, 8, 1e9, 1e8, 1e-4, 1e-3, True, "a test")
SAMPLES = 3


def job_of(recipe: Recipe, ranks: int, slots: int, chunk: int) -> Job:
    requests = mixed_requests(samples=SAMPLES)
    lengths = Lengths([r.max_new_tokens for r in requests], [r.max_new_tokens for r in requests], "a test")
    prompts = Prompts(11, 5.0, "a test")
    job = Job.of(recipe, ranks, "cuda", prompts, lengths, 4)
    each = len(requests) // SAMPLES
    return job.with_settings(
        "rollout", prompts_per_step=each, samples_per_prompt=SAMPLES, slots=slots, chunk_tokens=chunk
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("slots", "chunk"), [(2, 5), (5, 3), (15, 4)])
def test_rounds_are_those_of_the_engine(small: Recipe, ranks: int, slots: int, chunk: int) -> None:
    found = run_ranks(ranks, _rounds, slots, chunk)
    job = job_of(small, ranks, slots, chunk)
    rollouts = Rollouts(job, PROFILE, job.lengths.written)
    assert {rounds for rounds, _ in found} == {rollouts.run().rounds}
    assert [decoded for _, decoded in found] == rollouts.decoded.tolist()


def _rounds(slots: int, chunk: int) -> tuple[int, int]:
    pair, world = models(torch.float32), start_world()
    sizes = EngineSettings(slots, chunk, (), Sampling(), TOP_K, 7, torch.device("cpu"))
    engine = RolloutEngine(
        Resident(pair.student), [lambda: nullcontext(pair.teacher)], NeverRule(), frozenset(), world.collective, sizes,
        lambda name: nullcontext(),
    )  # fmt: skip
    engine.generate(mixed_requests(samples=SAMPLES), stream=1)
    return engine.stats.rounds, engine.stats.decoded_tokens


def test_a_decode_step_by_hand(small: Recipe) -> None:
    """One rollout alone on one rank, memory-bound: weights once per token, the keys before it, the logits of sampling."""
    job = job_of(small, 1, 1, 4).with_settings("rollout", prompts_per_step=1, samples_per_prompt=1)
    step = Rollouts(job, PROFILE, [8]).run()
    shape = job.student
    weights = shape.multiplied * 4
    keys = sum(shape.key_bytes * (5 + done + 2) * 4 for done in (0, 4))
    expected = 8 * (weights + 6 * 4 * shape.vocabulary) / 1e9 + keys / 1e9 + 8 * PROFILE.token_step
    assert step.seconds["decode"] == pytest.approx(expected)
    assert step.rounds == 2 and step.waiting == 0.0


def test_links_by_hand() -> None:
    inside = PROFILE.collective(8e9, 8, calls=10)
    assert inside == pytest.approx(8 * 7 / 8 + 10 * 1e-4 * 3)
    # Three quarters come from the three other nodes, through the eight cards of each node.
    assert PROFILE.collective(8e9, 32, calls=0) == pytest.approx(8e9 * 3 / 4 / 8 / 1e8)
    assert PROFILE.collective(8e9, 1) == 0.0


def faster(**factors: float) -> Profile:
    return Profile(**{**vars(PROFILE), **{key: vars(PROFILE)[key] * factor for key, factor in factors.items()}})


def test_twice_the_machine_takes_half_the_time(small: Recipe) -> None:
    job = job_of(small, 2, 4, 4)
    work: tuple[Any, Any] = (job.lengths.written, job.lengths.kept)
    rates = dict.fromkeys(("flops", "bandwidth", "inside", "between"), 2.0) | {"latency": 0.5, "token_step": 0.5}
    assert simulate(job, faster(**rates), *work).total == pytest.approx(simulate(job, PROFILE, *work).total / 2)


def test_the_teacher_s_top_k_costs_the_student_s_head_once_more(small: Recipe) -> None:
    kat = {"kind": "kat", "window": 4}
    job, other = (job_of(changed(small, stop=stop), 1, 15, 4) for stop in (kat, kat | {"support": "teacher_top_k"}))
    lengths = [8] * 15  # all slots, two rounds
    usual, more = (simulate(each, PROFILE, lengths, lengths).seconds for each in (job, other))
    head = 2 * job.student.hidden * job.student.vocabulary * 15 * 8 / PROFILE.flops
    assert more["teacher"] - usual["teacher"] == pytest.approx(head)
    assert {key: value for key, value in more.items() if key != "teacher"} == pytest.approx(
        {key: value for key, value in usual.items() if key != "teacher"}
    )


def test_shorter_rollouts_take_less_and_every_rank_has_its_share(small: Recipe) -> None:
    job = job_of(small, 4, 4, 4)
    written = list(job.lengths.written)
    whole, half = (simulate(job, PROFILE, lengths, lengths) for lengths in (written, [n // 2 for n in written]))
    assert half.total < whole.total
    assert whole.tokens == sum(written)
    alone = simulate(job.on(1), PROFILE, written, written)
    assert whole.seconds["learn"] < alone.seconds["learn"]


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_can_be_planned_for(name: str) -> None:
    gpu = GPUS[name]
    assert 0 < gpu.usable < gpu.memory and gpu.collective(1e9, 1024) >= gpu.collective(1e9, 16)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(merge(recipe.model_dump(mode="json"), sections))


def test_a_teacher_that_begins_writes_as_a_student_of_its_size_would(small: Recipe) -> None:
    sections = {"teacher": {"gather": "once"}, "behaviour": {"kind": "teacher_prefix", "lengths": "longest"}}
    job = job_of(changed(small, **sections), 2, 4, 4)
    lengths = job.prefixes
    assert set(lengths) == {small.rollout.max_new_tokens - 1}
    plain = replace(job_of(small, 2, 4, 4), student=job.teachers[0].shape).with_settings(
        "rollout", samples_per_prompt=1
    )
    alone = Rollouts(plain, PROFILE, lengths).run()
    whole = simulate(job, PROFILE, *job.drawn)
    assert whole.seconds["teacher writes"] == pytest.approx(alone.seconds["prefill"] + alone.seconds["decode"])
    # The student then reads what the teacher has written, and learns with it before its own token.
    longer = Rollouts(job, PROFILE, job.drawn[0]).run()
    assert longer.seconds["prefill"] > Rollouts(plain, PROFILE, job.drawn[0]).run().seconds["prefill"]


def test_the_budget_of_topd_is_what_its_teacher_reads_and_writes(small: Recipe) -> None:
    sections = {"teacher": {"gather": "once"}, "objective": {"kind": "topd", "budget": 2.0, "horizon": 6}}
    twice, once = (
        simulate(job_of(changed(small, **merge(sections, {"objective": {"budget": budget}})), 2, 4, 4), PROFILE, [20] * 30, [20] * 30)
        for budget in (2.0, 1.0)
    )  # fmt: skip
    assert 1.5 < twice.seconds["teacher writes"] / once.seconds["teacher writes"] < 2.5
    assert "teacher writes" not in simulate(job_of(small, 2, 4, 4), PROFILE, [20] * 30, [20] * 30).seconds


def test_a_teacher_with_twice_the_tokens_takes_twice_the_time(small: Recipe) -> None:
    """Of its arithmetic: on a machine whose memory costs nothing."""
    sections = {
        "objective": {"kind": "cross_tokenizer"},
        "stop": {"kind": "never"},
        "rollout": {"top_p": 1.0},
        "teacher": {"gather": "once"},
    }
    job = job_of(changed(small, **sections), 1, 4, 4)
    fast = faster(bandwidth=1e6)
    one, two = (
        simulate(replace(job, prompts=replace(job.prompts, reading=reading)), fast, [12] * 15, [12] * 15).seconds[
            "teacher"
        ]
        for reading in (1.0, 2.0)
    )
    assert two / one == pytest.approx(2, rel=0.25)  # the keys of more tokens are more


def test_ranks_that_share_micro_batches(small: Recipe) -> None:
    alone, shared = (job_of(changed(small, train={"sequence_parallel": n}), 2, 4, 4) for n in (1, 2))
    steps = [simulate(job, PROFILE, job.lengths.written, job.lengths.kept) for job in (alone, shared)]
    assert steps[1].flows["learn: attention"].ranks == 2 and "learn: attention" not in steps[0].flows
    (long,) = {rank[0] for rank in [tuple(map(sum, batches)) for batches in shared.micro_batches]}
    assert shared.micro_batch_tokens <= long


def test_ranks_are_to_share_what_one_cannot_hold(small: Recipe) -> None:
    recipe = changed(small, rollout={"max_new_tokens": 2000}, train={"sequence_parallel": 1})
    job = Job.of(recipe, 4, "cpu", Prompts(9, 9.0, "a test"), longest(recipe), 4)
    alone, two = (
        memory(job.with_settings("train", micro_batch_tokens=1, sequence_parallel=size), ("learn",)).peak(LEARN)[0]
        for size in (1, 2)
    )
    assert two < alone
    found = {a.setting: a.value for a in advice(job, replace(PROFILE, device="cpu", memory=(alone + two) // 2))}
    assert found["train.micro_batch_tokens"] is None and found["train.sequence_parallel"] == 2
    assert "train.sequence_parallel" not in {
        a.setting for a in advice(job, replace(PROFILE, device="cpu", memory=alone))
    }


def test_blocks_of_ranks_wait_for_each_other_at_the_end_only(small: Recipe) -> None:
    """Each rank with a teacher of its own: as if it were alone with its part of the prompts."""
    together, apart = (job_of(changed(small, teacher={"shard": n}), 2, 2, 4) for n in (2, 1))
    requests, written = mixed_requests(samples=SAMPLES), [3] * 9 + [20] * 6
    place = {request.id: i for i, request in enumerate(requests)}
    parts = [
        [written[place[request.id]] for request in part] for part in share(requests, 2)
    ]  # as the engine deals them
    alone = [Rollouts(apart, PROFILE, part, ranks=1).run() for part in parts]
    step = simulate(apart, PROFILE, written, written)
    slowest = max(alone, key=lambda each: each.total)
    assert step.seconds["decode"] == slowest.seconds["decode"] and step.rounds == slowest.rounds
    assert step.waiting == pytest.approx(slowest.total - sum(each.total for each in alone) / 2)
    assert (step.tokens, step.decoded) == (sum(written), sum(each.decoded for each in alone))
    assert (
        "rollout: control" not in step.flows
        and "rollout: control" in simulate(together, PROFILE, written, written).flows
    )


def test_what_does_not_overlap_takes_its_time(small: Recipe) -> None:
    """overlap_comm off: layers are gathered, and then multiplied with."""
    job = job_of(small, 2, 4, 4)
    assert not job.zero.overlap  # so are the tests' own files

    def overlapping(zero: ZeroSettings) -> ZeroSettings:
        return replace(zero, overlap=True)

    teachers = tuple(replace(teacher, zero=overlapping(teacher.zero)) for teacher in job.teachers)
    other = replace(job, zero=overlapping(job.zero), teachers=teachers)
    apart, beside = (simulate(each, PROFILE, [20] * 15, [20] * 15) for each in (job, other))
    gathered = apart.wire["rollout: teacher"]
    assert 0 < apart.seconds["teacher"] - beside.seconds["teacher"] <= gathered * 1.0001
    assert apart.seconds["learn"] > beside.seconds["learn"]
    # A teacher that reads beside the student does so on a GPU only.
    overlapped = other.with_settings("rollout", overlap=True)
    gpu, cpu = (
        simulate(overlapped, replace(PROFILE, device=device), [20] * 15, [20] * 15) for device in ("cuda", "cpu")
    )
    assert "teacher" not in gpu.seconds and "teacher" in cpu.seconds and gpu.total < cpu.total
