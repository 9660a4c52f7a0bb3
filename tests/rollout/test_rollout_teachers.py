"""Several teachers: every rollout is scored by the teacher of its prompt, exactly as if there were no other."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rollout_setup import (
    RANDOM,
    SEED,
    TOP_K,
    VOCABULARY,
    Resident,
    facts,
    firing_threshold,
    kat,
    mixed_requests,
    models,
)
from zoo import deepspeed_json, random_model

from katds.core.collective import Collective, Solo
from katds.core.stop.base import StopRule
from katds.core.stop.simple import NeverRule
from katds.core.types import Need, RolloutBatch, RolloutRequest
from katds.models.causal import FlatCausalLM
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings

NEEDS = frozenset({Need.SAMPLED, Need.STUDENT_TOP_K, Need.TEACHER_TOP_K, Need.WRITTEN, Need.ENTROPY})
EOS = (5, 23, 40)
OTHER = {"seed": 9, "hidden": 40, "layers": 1, **RANDOM}


@cache
def other_teacher() -> FlatCausalLM:
    """Of another width and depth."""
    return FlatCausalLM(random_model(attn_implementation="katds", **OTHER).double().eval(), VOCABULARY)


def write(
    teachers: list[Any], requests: list[RolloutRequest], rule: StopRule | None = None, collective: Collective | None = None,
    **sizes: Any,
) -> RolloutBatch:  # fmt: skip
    settings = {"slots": 4, "chunk_tokens": 5, "overlap": False, **sizes}
    made = RolloutEngine(
        Resident(models().student), [lambda each=each: nullcontext(each) for each in teachers], rule or NeverRule(), NEEDS,
        collective or Solo(),
        EngineSettings(
            eos_ids=EOS, sampling=Sampling(), top_k=TOP_K, seed=SEED, device=torch.device("cpu"), **settings
        ),
        lambda name: nullcontext(),
    )  # fmt: skip
    return made.generate(requests, 1)


def routed(requests: list[RolloutRequest]) -> list[RolloutRequest]:
    """Prompts 11 and 14 go to the other teacher; samples of a prompt stay together."""
    return [replace(r, prompt=replace(r.prompt, teacher=int(r.prompt.index in (11, 14)))) for r in requests]


def rows_by_rollout(batch: RolloutBatch) -> dict[int, dict[str, torch.Tensor]]:
    rows: dict[int, dict[str, torch.Tensor]] = {r.id: {} for r in batch.rollouts}
    for key, values in batch.signal.items():
        for rollout, part in zip(batch.rollouts, values.split([r.kept for r in batch.rollouts]), strict=True):
            rows[rollout.id][key] = part
    return rows


def assert_rows(batch: RolloutBatch, expected: dict[int, dict[str, torch.Tensor]]) -> None:
    for rollout_id, fields in rows_by_rollout(batch).items():
        assert fields.keys() == expected[rollout_id].keys()
        for key, values in fields.items():
            torch.testing.assert_close(values, expected[rollout_id][key], rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("stopped", "of_teacher"), [(False, False), (True, False), (True, True)], ids=["free", "stopped", "of_teacher"]
)
def test_each_rollout_is_scored_by_the_teacher_of_its_prompt(stopped: bool, of_teacher: bool) -> None:
    """As written with this teacher alone, in any slots and chunks, whoever sits beside it."""
    requests = routed(mixed_requests(audit_every=4))
    teachers = [models().teacher, other_teacher()]
    measured = write(teachers, requests, kat(None, of_teacher=of_teacher))
    threshold = firing_threshold(measured.rollouts)

    def rule() -> StopRule | None:
        return kat(threshold, of_teacher=of_teacher) if stopped else None

    expected, alone = {}, []
    for number, teacher in enumerate(teachers):
        own = [replace(r, prompt=replace(r.prompt, teacher=0)) for r in requests if r.prompt.teacher == number]
        batch = write([teacher], own, rule())
        expected |= rows_by_rollout(batch)
        alone += facts(batch)
    assert stopped == any(fact[4] is not None for fact in alone)
    for slots, chunk, overlap in ((15, 1, False), (4, 5, False), (3, 16, True), (7, 4, True), (1, 3, False)):
        batch = write(teachers, requests, rule(), slots=slots, chunk_tokens=chunk, overlap=overlap)
        assert facts(batch) == sorted(alone)
        assert_rows(batch, expected)


def test_the_teachers_differ() -> None:
    """Or the test above would pass with one of them for all."""
    requests = mixed_requests()
    one, two = (write([teacher], requests).signal["sampled"] for teacher in (models().teacher, other_teacher()))
    assert (one - two).abs().mean() > 0.1


def sharded(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """What each of two ranks wrote, where the second rank gets no rollout of the other teacher, or none at all."""
    world = start_world()
    config = deepspeed_json()
    teachers = [load_frozen(folder / name, config, VOCABULARY) for name in ("first", "second")]
    results = []
    for requests in (routed(mixed_requests()), routed(mixed_requests())[:1], routed(mixed_requests())[3:4]):
        student = FlatCausalLM(random_model(seed=1, attn_implementation="katds", **RANDOM).eval(), VOCABULARY)
        engine = RolloutEngine(
            Resident(student), [teacher.reading for teacher in teachers], NeverRule(), frozenset({Need.SAMPLED}),
            world.collective, EngineSettings(2, 5, EOS, Sampling(), TOP_K, SEED, world.device),
            lambda name: nullcontext(),
        )  # fmt: skip
        batch = engine.generate(requests, 1)
        results.append([(r.id, r.response_ids, rows["sampled"].tolist()) for r, rows in zip(
            batch.rollouts, rows_by_rollout(batch).values(), strict=True)])  # fmt: skip
    return results, {}


def test_sharded_teachers_are_asked_by_all_ranks_together(tmp_path: Path) -> None:
    for name, options in (("first", {"seed": 2, "hidden": 48, **RANDOM}), ("second", OTHER)):
        random_model(**options).save_pretrained(tmp_path / name)
    alone = run_ranks(1, sharded, tmp_path)[0][0]
    both = [result for result, _ in run_ranks(2, sharded, tmp_path)]
    for case, expected in enumerate(alone):
        seen = sorted(entry for rank in both for entry in rank[case])
        assert [entry[:2] for entry in seen] == [entry[:2] for entry in expected]
        for (*_, mine), (*_, right) in zip(seen, expected, strict=True):
            assert mine == pytest.approx(right, abs=1e-4)
