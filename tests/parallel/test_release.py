"""Learning with a model beyond ZeRO-3's limits never holds it whole, and has the same gradients as one that is held."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional
from ranks import run_ranks
from test_view import VOCABULARY, packed
from zoo import build_model, deepspeed_json, optimizer

from katds.models.causal import linear
from katds.parallel.world import start_world
from katds.parallel.zero import ZeroStudent, load_student

MIB = 2**20


def load(path: Path, released: bool, checkpointing: bool) -> ZeroStudent:
    config = deepspeed_json()
    if released:
        limits = ("stage3_max_reuse_distance", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
        config["zero_optimization"].update(dict.fromkeys(limits, 0))
    return load_student(path, config, VOCABULARY, optimizer(), checkpointing=checkpointing)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def learn(path: Path, released: bool, checkpointing: bool) -> tuple[int, list[int], list[float]]:
    """Bytes of the whole model, by how much memory grows in each forward, and the gradient norms."""
    start_world()
    student, original = load(path, released, checkpointing), torch.nn.functional.linear
    whole = 4 * sum(p.ds_numel for p in student.engine.module.parameters())
    assert (student._linear is not original) == (released and not checkpointing), "slower than need be"
    grown, norms = [], []
    for _ in range(2):
        gc.collect()
        before = resident()
        loss = student.forward(**packed() | {"head": lambda *head: linear(*head).logsumexp(-1).sum()})
        gc.collect()
        grown.append(resident() - before)
        student.backward(loss, last=True)
        norms.append(student.step(1e-3))
        del loss
    assert torch.nn.functional.linear is original
    return whole, grown, norms


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_released_between_forward_and_backward(tmp_path: Path, checkpointing: bool) -> None:
    path = build_model(tmp_path / "student", seed=1, hidden=512, layers=6)
    for whole, grown, _ in run_ranks(2, learn, path, True, checkpointing):
        assert whole > 35 * MIB and max(grown[1:]) < whole / 4, f"{[g // MIB for g in grown]} of {whole // MIB} MiB"


def test_gradients_are_those_of_a_model_that_is_held(tmp_path: Path) -> None:
    path = build_model(tmp_path / "student", seed=1, layers=3)
    results: list[Any] = [run_ranks(2, learn, path, released, False)[0][2] for released in (True, False)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
