"""`rollout.weights: copy` decodes from the same bits as `view`, refreshed when they change, at addresses that never do."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from ranks import run_ranks
from test_view import VOCABULARY, learn, live_bytes, packed, partitioned
from zoo import build_model, deepspeed_json, optimizer

from katds.core.collective import Collective
from katds.parallel import checkpoint
from katds.parallel.view import StudentView
from katds.parallel.world import start_world
from katds.parallel.zero import ZeroStudent, load_student


def load(path: Path, keep_copy: bool, dtype: str = "fp32") -> ZeroStudent:
    config = deepspeed_json() | ({"bf16": {"enabled": True}} if dtype == "bf16" else {})
    return load_student(path, config, VOCABULARY, optimizer(), checkpointing=False, keep_copy=keep_copy)


def bits(student: Any) -> dict[str, torch.Tensor]:
    with student.decoding() as model:
        return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def gathers(student: Any) -> int:
    """How many gathers a phase begins with."""
    with mock.patch.object(
        partition_parameters.GatheredParameters, "__enter__", autospec=True,
        side_effect=partition_parameters.GatheredParameters.__enter__,
    ) as entered:  # fmt: skip
        with student.decoding():
            pass
        return int(entered.call_count)


def on_rank(path: Path, dtype: str, root: Path) -> dict[str, Any]:
    gc.freeze()
    collective: Collective = start_world().collective
    student = load(path, True, dtype)
    view = StudentView(
        student.engine.module, load(path, False, dtype)._view._skeleton
    )  # lends what the copy should hold
    seen: dict[str, Any] = {"addresses": [], "gathers": [], "closed": [], "moved": []}

    def phase() -> dict[str, torch.Tensor]:
        seen["gathers"].append(gathers(student))
        assert partitioned(student.engine)
        with student.decoding() as model:
            assert not torch.is_grad_enabled() and not model.training
            assert not any(p.requires_grad or hasattr(p, "ds_id") for p in model.parameters())
            seen["addresses"].append([p.data_ptr() for p in model.parameters()])
            seen["tied"] = model.head.weight is model.model.get_input_embeddings().weight
            logits = model(**packed())
        mine = bits(student)
        with view.open() as lent:
            theirs = {name: p.detach().clone() for name, p in lent.named_parameters(remove_duplicate=False)}
            assert torch.equal(logits, lent(**packed()))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        return mine

    store = checkpoint.CheckpointStore(root / "checkpoints", student.engine, collective, 2, _Recipe(), dict)
    first = phase()
    with mock.patch("katds.parallel.checkpoint.dump_recipe", return_value=""):
        store.save(0)
    for _ in range(4):
        learn(student)
        latest = phase()
        seen["moved"].append(float((latest["model.lm_head.weight"] - first["model.lm_head.weight"]).abs().max()))
        seen["closed"].append(live_bytes())
    checkpoint.load(student, checkpoint.find_newest(root / "checkpoints"), collective)
    again = phase()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert gathers(student) == 0, "nothing has changed, and it was refreshed"
    seen["own"] = sum(p.numel() * p.element_size() for p in set(student._copy._own.values()))
    return seen


class _Recipe:
    """Not what this test is about."""


@pytest.mark.parametrize(("tied", "dtype"), [(True, "fp32"), (False, "fp32"), (True, "bf16")])
def test_copy_is_the_view_bit_for_bit(tmp_path: Path, tied: bool, dtype: str) -> None:
    """After updates, after a checkpoint is loaded; one parameter gathered at a time, and only when something has changed."""
    path = build_model(tmp_path / "student", seed=1, tied=tied, vocabulary=70, layers=3)
    for seen in run_ranks(2, on_rank, path, dtype, tmp_path):
        assert len({tuple(addresses) for addresses in seen["addresses"]}) == 1, "the weights have moved"
        assert seen["gathers"] == [len(seen["addresses"][0])] * 6, "not parameter by parameter"
        assert seen["tied"] is tied
        assert min(seen["moved"]) > 1e-3, "the updates have not moved the weights"
        # A leak makes every later phase hold more. gloo's threads drop a collective's few numbers a moment late.
        _, second, *later = seen["closed"]
        assert min(later) < second + seen["own"] // 10, f"phases leave something behind: {seen['closed']}"


def held_while_refreshing(path: Path) -> tuple[int, int, int]:
    start_world()
    student = load(path, True)
    parameters, peak = list(student.engine.module.parameters()), 0
    leave = partition_parameters.GatheredParameters.__exit__

    def look(self: Any, *error: Any) -> Any:
        nonlocal peak
        peak = max(peak, sum(p.data.numel() for p in parameters))
        return leave(self, *error)

    with mock.patch.object(partition_parameters.GatheredParameters, "__exit__", look), student.decoding() as model:
        whole = sum(p.numel() for p in model.parameters())
    return peak, whole, max(p.ds_numel for p in parameters)


def test_the_copy_never_costs_the_whole_model_twice(tmp_path: Path) -> None:
    path = build_model(tmp_path / "student", seed=1, layers=6)
    for peak, whole, largest in run_ranks(2, held_while_refreshing, path):
        assert largest <= peak < largest + 200 < whole / 4  # placeholders of the partitioned ones


def failing(path: Path) -> bool:
    """A phase that fails leaves the copy in place; a refresh that fails does not count as one."""
    start_world()
    student = load(path, True)
    no_memory = mock.patch.object(torch.Tensor, "clone", side_effect=RuntimeError("no memory"))
    with no_memory, pytest.raises(RuntimeError, match="no memory"), student.decoding():
        pass
    before = bits(student)
    with pytest.raises(RuntimeError, match="writing failed"), student.decoding():
        raise RuntimeError("writing failed")
    after = bits(student)
    return all(torch.equal(before[name], after[name]) for name in before)


def test_errors_leave_a_whole_copy(tmp_path: Path) -> None:
    assert run_ranks(2, failing, build_model(tmp_path / "student", seed=1)) == [True, True]
