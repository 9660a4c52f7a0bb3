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
from torch.multiprocessing.reductions import StorageWeakRef
from zoo import build_model, deepspeed_json, optimizer

from katds.models.causal import linear
from katds.parallel.world import start_world
from katds.parallel.zero import ZeroStudent, load_student


def load(path: Path, released: bool, checkpointing: bool) -> ZeroStudent:
    config = deepspeed_json()
    if released:
        limits = ("stage3_max_reuse_distance", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
        config["zero_optimization"].update(dict.fromkeys(limits, 0))
    return load_student(path, config, VOCABULARY, optimizer(), checkpointing=checkpointing)


def watch(model: Any) -> list[tuple[StorageWeakRef, int]]:
    """Fills with the memory of every weight that a matrix product of the layers reads, and its bytes."""
    found: list[tuple[StorageWeakRef, int]] = []

    def look(module: torch.nn.Module, _: Any) -> None:
        storage = module.weight.data.untyped_storage()
        found.append((StorageWeakRef(storage), storage.nbytes()))

    for module in model.model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(look)
    return found


def learn(path: Path, released: bool, checkpointing: bool) -> tuple[int, int, list[float]]:
    """Bytes of the weights that a forward read, those of them that live on after it, and the gradient norms of two updates."""
    start_world()
    student, original = load(path, released, checkpointing), torch.nn.functional.linear
    assert (student._linear is not original) == (released and not checkpointing), "slower than need be"
    seen, norms, read, held = watch(student.engine.module), [], 0, 0
    for _ in range(2):
        seen.clear()
        loss = student.forward(**packed() | {"head": lambda *head: linear(*head).logsumexp(-1).sum()})
        gc.collect()
        read, held = sum(size for _, size in seen), sum(size for ref, size in seen if not ref.expired())
        student.backward(loss, last=True)
        norms.append(student.step(1e-3))
    assert torch.nn.functional.linear is original
    return read, held, norms


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_released_between_forward_and_backward(tmp_path: Path, checkpointing: bool) -> None:
    path = build_model(tmp_path / "student", seed=1, layers=6)
    for read, held, _ in run_ranks(2, learn, path, True, checkpointing):
        assert held < read / 6, f"{held} of {read} bytes"


def test_gradients_are_those_of_a_model_that_is_held(tmp_path: Path) -> None:
    path = build_model(tmp_path / "student", seed=1, layers=3)
    results: list[Any] = [run_ranks(2, learn, path, released, False)[0][2] for released in (True, False)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
