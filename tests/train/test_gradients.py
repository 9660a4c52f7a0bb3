"""The gradient of an update does not depend on ranks, packing or tiles, and is that of plain PyTorch (DESIGN section 8.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from deepspeed.utils import safe_get_full_grad
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from local_ranks import LocalRank, run_local
from ranks import run_ranks
from reference import (
    OBJECTIVE_SETTINGS,
    PUBLISHED,
    SAMPLED,
    PlainStudent,
    PlainTeacher,
    Reference,
    distance,
    plain,
    reference_gradient,
    scored,
)
from transformers import AutoModelForCausalLM
from zoo import build_model, deepspeed_json, optimizer

from katds.core.collective import Solo
from katds.models import tiled_head
from katds.parallel.sequence import UlyssesShards
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen, load_student

KEPT = [9, 1, 0, 14, 6, 3, 0, 22, 5, 11]  # tokens learnt from, by rollout
ALL = list(range(len(KEPT)))
LONE = ("reverse_kl_full", "policy_gradient")
OWNERS = {
    "spread": lambda i, size: i % size,
    "one_rank": lambda i, size: size - 1,  # the others wrote nothing
}


class Models:
    """Folders of a tied and an untied student with padded heads and a teacher, and the same in plain fp64."""

    def __init__(self, root: Path) -> None:
        self.paths = {
            "tied": build_model(root / "tied", seed=1, tied=True, vocabulary=70),
            "untied": build_model(root / "untied", seed=3, vocabulary=68),
            "teacher": build_model(root / "teacher", seed=2, hidden=48, vocabulary=72),
        }
        self.plain = {name: plain(path) for name, path in self.paths.items()}
        self.data = {name: scored(self.plain[name], self.plain["teacher"], KEPT) for name in ("tied", "untied")}
        self._gradients: dict[tuple[str, ...], Reference] = {}

    def gradient(self, student: str, name: str) -> Reference:
        if (student, name) not in self._gradients:
            self._gradients[student, name] = reference_gradient(name, self.plain[student], self.data[student], ALL)
        return self._gradients[student, name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a tile, so that ranks differ in their number of tiles."""
    monkeypatch.setattr(tiled_head, "CPU_TILE_ELEMENTS", 3 * reference.VOCABULARY)


def update_plain(
    models: Models,
    student: str,
    name: str,
    collective: Any,
    owner: Any,
    budget: int,
    checkpointing: bool = False,
    minibatches: int = 1,
) -> tuple[PlainStudent, dict[str, float]]:
    """One update in fp64 of the learner around an unsharded student."""
    data, dtype = models.data[student], torch.float64
    learns = PlainStudent(models.plain[student], collective, checkpointing)
    rule = reference.objective(name)
    learner = reference.learner(
        name, learns, PlainTeacher(models.plain["teacher"], dtype), collective, budget, minibatches
    )
    batch = data.batch(lambda i: owner(i, collective.size) == collective.rank, rule.needs, dtype)
    return learns, learner.update(batch, data.requests, step=0)


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_kl_full", "tropd", "eopd", "iw_opd"])
def test_a_hole_is_in_no_loss(models: Models, small_tiles: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`stop.supervise: after` keeps what follows the trap; the trap is read as context, and not learnt from."""
    data, whole = models.data["tied"], models.gradient("tied", name).gradient
    monkeypatch.setattr(data.rollouts[3], "hole", (4, 9))
    monkeypatch.setattr(data.rollouts[7], "hole", (10, 50))  # to the end of what is kept
    expected, loss, tokens = reference_gradient(name, models.plain["tied"], data, ALL)
    learns, report = update_plain(models, "tied", name, Solo(), OWNERS["spread"], 40)
    assert distance(learns.updates[0], expected) < 1e-12
    assert distance(learns.updates[0], whole) > 1e-3
    assert report["tokens"] == tokens == sum(KEPT) - 5 - 12 and report["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVE_SETTINGS)
@pytest.mark.parametrize("student", ["tied", "untied"])
def test_gradient_is_plain_autograd_in_fp64(models: Models, small_tiles: None, student: str, name: str) -> None:
    expected, loss, tokens = models.gradient(student, name)
    for budget, checkpointing in ((1, False), (40, True), (10**6, False)):
        learns, report = update_plain(models, student, name, Solo(), OWNERS["spread"], budget, checkpointing)
        assert distance(learns.updates[0], expected) < 1e-12
        assert report["tokens"] == tokens and (tokens == sum(KEPT)) != name.startswith(
            ("reopold", "cross", "tropd_left")
        )
        assert report["loss"] == pytest.approx(loss, rel=1e-9)
        assert report["loss"] == report["kl"] or name in SAMPLED
        assert report["gradient_norm"] == pytest.approx(
            float(torch.stack([g.norm() for g in expected.values()]).norm())
        )


@settings(
    max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_gradient_ignores_ranks_owners_and_budget_in_fp64(
    models: Models, small_tiles: None, data: st.DataObject
) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 4]))
    owners = data.draw(st.lists(st.integers(0, size - 1), min_size=len(KEPT), max_size=len(KEPT)))
    budget, name = data.draw(st.integers(1, 90)), data.draw(st.sampled_from(sorted(OBJECTIVE_SETTINGS)))
    student = data.draw(st.sampled_from(["tied", "untied"]))

    def job(rank: LocalRank) -> tuple[PlainStudent, dict[str, float]]:
        return update_plain(models, student, name, rank, lambda i, _: owners[i], budget)

    results = run_local(size, job)
    for learns, report in results:
        assert distance(learns.updates[0], models.gradient(student, name).gradient) < 1e-12
        assert report == results[0][1]


def test_minibatches_take_every_nth_rollout(models: Models) -> None:
    """Each of them is normalised by its own tokens; the report is over all."""
    name, student = "reverse_kl", "tied"
    learns, report = update_plain(models, student, name, Solo(), OWNERS["spread"], 40, minibatches=3)
    losses = 0.0
    for minibatch, gradient in enumerate(learns.updates):
        chosen = ALL[minibatch::3]
        expected, loss, _ = reference_gradient(name, models.plain[student], models.data[student], chosen)
        assert distance(gradient, expected) < 1e-12
        losses += loss * sum(KEPT[i] for i in chosen)
    assert report["loss"] == pytest.approx(losses / sum(KEPT))


def test_nothing_kept_means_no_update(models: Models) -> None:
    data = scored(models.plain["tied"], models.plain["teacher"], [0, 0])
    learns = PlainStudent(models.plain["tied"], Solo())
    learner = reference.learner("reverse_kl", learns, None, Solo(), 40)
    report = learner.update(data.batch(lambda i: True, learner._objective.needs, torch.float64), data.requests, 0)
    assert not learns.updates and report == {"tokens": 0.0, "micro_batches": 0.0}


def zero_errors(
    models: Models, student: str, checkpointing: bool, config: dict[str, Any], sharers: int
) -> dict[str, dict[str, float]]:
    """On a rank: every objective through real ZeRO-3 engines; the errors of gradient, norm and loss against fp64.

    `sharers`: ranks that share a micro-batch by sequence parallelism."""
    world = start_world()
    shards = UlyssesShards(sharers) if sharers > 1 else None
    # Rate 0: the weights stay, so one pair of engines serves all cases.
    settings = optimizer(lr=0.0, gradient_clip=None)
    learns = load_student(models.paths[student], config, reference.VOCABULARY, settings, checkpointing)
    teacher = load_frozen(models.paths["teacher"], config, reference.VOCABULARY)
    seen: list[dict[str, torch.Tensor]] = []
    take_step = learns.step

    def step(lr: float) -> float:
        seen.append({n: safe_get_full_grad(p).clone() for n, p in learns.engine.module.model.named_parameters()})
        return take_step(lr)

    learns.step = step  # type: ignore[method-assign]
    tiled_head.CPU_TILE_ELEMENTS = 3 * reference.VOCABULARY
    errors = {}
    data, dtype = models.data[student], learns.engine.module.model.dtype
    for name in OBJECTIVE_SETTINGS:
        # Of the five minibatches some have fewer rollouts than there are ranks: the others go through a dummy.
        cases = [("spread", 24, 1), ("one_rank", 10**6, 5 if name in LONE else 1)]
        for owner, budget, minibatches in cases[name in PUBLISHED :]:
            learner = reference.learner(name, learns, teacher, world.collective, budget, minibatches, shards)
            needs = reference.objective(name).needs
            batch = data.batch(lambda i, to=OWNERS[owner]: to(i, world.size) == world.rank, needs, dtype)
            report = learner.update(batch, data.requests, step=0)
            tokens = [sum(KEPT[i::minibatches]) for i in range(minibatches)]
            gradient = {key: sum(g[key] * n for g, n in zip(seen, tokens, strict=True)) / sum(KEPT) for key in seen[0]}
            seen.clear()
            error = errors_of(models, student, name, gradient, report)
            if minibatches > 1:
                del error["norm"]  # that of the last one
            errors[f"{name} {owner}"] = error
    return errors


def errors_of(
    models: Models, student: str, name: str, gradient: dict[str, torch.Tensor], report: dict[str, float]
) -> dict[str, float]:
    expected, loss, _ = models.gradient(student, name)
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    errors = {"gradient": distance(gradient, expected), "norm": abs(report["gradient_norm"] / norm - 1)}
    return errors if name in SAMPLED else errors | {"loss": abs(report["loss"] / loss - 1)}


def plain_errors(models: Models, student: str, dtype: torch.dtype) -> dict[str, float]:
    """Of the same learner around an unsharded model of this type; by objective."""
    learns = PlainStudent(AutoModelForCausalLM.from_pretrained(models.paths[student], dtype=dtype), Solo())
    teacher, errors = PlainTeacher(models.plain["teacher"], dtype), {}
    for name in OBJECTIVE_SETTINGS:
        learner = reference.learner(name, learns, teacher, Solo(), 24)
        batch = models.data[student].batch(lambda i: True, reference.objective(name).needs, dtype)
        report = learner.update(batch, models.data[student].requests, step=0)
        errors[name] = max(errors_of(models, student, name, learns.updates.pop(), report).values())
    return errors


@pytest.mark.parametrize(
    ("size", "student", "checkpointing", "dtype", "sharers"),
    [
        (1, "tied", True, torch.float32, 1),
        (2, "tied", False, torch.float32, 1),
        (2, "untied", True, torch.float32, 1),
        (4, "tied", True, torch.float32, 1),
        (2, "untied", False, torch.bfloat16, 1),
        (2, "untied", False, torch.float32, 2),
        (4, "tied", True, torch.float32, 2),
        (2, "untied", True, torch.bfloat16, 2),
    ],
)
def test_gradient_of_zero3_engines(
    models: Models, size: int, student: str, checkpointing: bool, dtype: torch.dtype, sharers: int
) -> None:
    """At most twice the rounding error of one unsharded model, against fp64 (ZeRO-3 has no fp64 gradients)."""
    bounds = plain_errors(models, student, dtype)
    assert max(bounds.values()) < (1e-5 if dtype is torch.float32 else 0.05), bounds
    config = deepspeed_json() | ({"bf16": {"enabled": True}} if dtype is torch.bfloat16 else {})
    for rank in run_ranks(size, zero_errors, models, student, checkpointing, config, sharers):
        for case, errors in rank.items():
            assert max(errors.values()) < 2 * bounds[case.split()[0]] + 1e-6, (case, errors, bounds)
