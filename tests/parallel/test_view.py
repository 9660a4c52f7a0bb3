"""The student's weights while it writes: the same logits as the plain model, no DeepSpeed hook, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import build_model, deepspeed_json, optimizer

from katds.models.causal import linear
from katds.models.plans import PackedPlan
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen, load_student

VOCABULARY = 65
CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(0))
LENGTHS = [7, 12, 5]


def packed() -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": TOKENS, "position_ids": positions, "plan": PackedPlan.of(LENGTHS, CPU), "head": linear}


def plain_logits(path: Path) -> torch.Tensor:
    """Sequence by sequence through transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model(piece[None]).logits[0, :, :VOCABULARY] for piece in TOKENS.split(LENGTHS)])


def live_bytes() -> int:
    """Bytes of all tensor storages that anyone holds, once each."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device == CPU:
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(held.values())


def learn(student: Any) -> None:
    """One step on a loss that moves every weight."""
    loss = student.forward(
        **packed() | {"head": lambda hidden, weight, bias: linear(hidden, weight, bias).logsumexp(-1).sum()}
    )
    student.backward(loss, last=True)
    student.step(1e-2)


def partitioned(engine: Any) -> bool:
    return all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p.data.numel() <= 1 for p in engine.module.parameters())


def on_rank(path: Path, out: Path) -> dict[str, Any]:
    gc.freeze()  # live_bytes looks at what is made from here on
    start_world()
    student = load_student(path, deepspeed_json(), VOCABULARY, optimizer(), checkpointing=True)
    assert partitioned(student.engine)
    seen: dict[str, Any] = {"logits": [], "open": [], "closed": []}
    unwanted = AssertionError("a DeepSpeed hook ran in the view")
    for phase in range(7):
        with student.decoding() as view:
            assert not torch.is_grad_enabled() and not view.training
            modules = list(view.modules())
            assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in modules)
            assert not any(p.requires_grad or hasattr(p, "ds_id") for p in view.parameters())
            with mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", side_effect=unwanted):
                logits = view(**packed())
            assert not logits.requires_grad
            if phase in (0, 1):
                seen["logits"].append(logits.numpy())
            seen["open"].append(live_bytes())
        del logits
        assert partitioned(student.engine)
        assert all(p is None for m in modules for p in m._parameters.values())
        seen["closed"].append(live_bytes())
        if phase == 0:
            learn(student)
            student.export(out, AutoTokenizer.from_pretrained(path))
    with pytest.raises(RuntimeError, match="writing failed"), student.decoding():  # released after an error, too
        raise RuntimeError("writing failed")
    assert partitioned(student.engine)
    seen["bytes"] = sum(p.ds_numel * 4 for p in student.engine.module.parameters())
    return seen


@pytest.mark.parametrize("tied", [True, False])
def test_view_is_the_plain_model_and_leaves_nothing(tmp_path: Path, tied: bool) -> None:
    path = build_model(tmp_path / "student", seed=1, tied=tied, vocabulary=70, layers=3)
    expected = [plain_logits(path)]
    ranks = run_ranks(2, on_rank, path, tmp_path / "trained")
    expected.append(plain_logits(tmp_path / "trained"))
    assert (expected[1] - expected[0]).abs().max() > 0.1, "the step has not moved the weights"
    for seen in ranks:
        for logits, plain in zip(seen["logits"], expected, strict=True):
            assert torch.allclose(torch.from_numpy(logits), plain, atol=2e-5)
        # From the third phase on, when the optimizer has its state: each phase borrows one model and gives it back.
        assert len(set(seen["closed"][2:])) == 1, seen
        assert len(set(seen["open"][2:])) == 1, seen
        borrowed = seen["open"][-1] - seen["closed"][-1]
        assert seen["bytes"] <= borrowed < 1.3 * seen["bytes"], seen


def frozen_on_rank(path: Path) -> Any:
    start_world()
    model = load_frozen(path, deepspeed_json(), VOCABULARY)
    through_engine = model(**packed())
    with model.decoding() as view:
        through_view = view(**packed())
    with model.head_weight() as (weight, bias):
        assert bias is None and weight.shape == (VOCABULARY, 32)
        head = weight.clone().numpy()
    assert partitioned(model.engine)
    assert not any(p.requires_grad for p in model.engine.module.parameters())
    return through_engine.numpy(), through_view.numpy(), head


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_model(tmp_path: Path, tied: bool) -> None:
    path = build_model(tmp_path / "teacher", seed=5, tied=tied, vocabulary=72)
    head = AutoModelForCausalLM.from_pretrained(path).lm_head.weight.detach()[:VOCABULARY]
    for through_engine, through_view, gathered in run_ranks(2, frozen_on_rank, path):
        for logits in (through_engine, through_view):
            assert torch.allclose(torch.from_numpy(logits), plain_logits(path), atol=2e-5)
        assert torch.equal(torch.from_numpy(gathered), head)


def gathers_of(path: Path, gather: str) -> list[int]:
    """Calls of GatheredParameters in two rollout phases with a forward in each, and for the head."""
    start_world()
    model, counts = load_frozen(path, deepspeed_json(), VOCABULARY, gather), []
    enter = partition_parameters.GatheredParameters.__enter__
    with mock.patch.object(
        partition_parameters.GatheredParameters, "__enter__", autospec=True, side_effect=enter
    ) as entered:
        for _ in range(2):
            with model.reading() as teacher:
                teacher(**packed())
            counts.append(entered.call_count)
            entered.reset_mock()
        with model.head_weight() as (weight, _):
            counts.append(entered.call_count)
            assert torch.is_grad_enabled() and weight.shape == (VOCABULARY, 32)
    return counts


@pytest.mark.parametrize(("gather", "parameters"), [("once", None), ("phase", 1), ("layer", 0)])
def test_a_teacher_is_gathered_as_often_as_it_is_said_to_be(
    tmp_path: Path, gather: str, parameters: int | None
) -> None:
    path = build_model(tmp_path / "teacher", seed=5)
    if parameters is None:  # once, one by one, and then never again, not for its head either
        expected = [len(list(AutoModelForCausalLM.from_pretrained(path).parameters())), 0, 0]
    else:
        expected = [parameters, parameters, 1]
    assert run_ranks(2, gathers_of, path, gather) == [expected] * 2


def held_while_loading(path: Path) -> tuple[int, int]:
    """On a rank: the most elements of whole parameters at any time, looked at before every release, and what stays."""
    start_world()
    known: dict[int, torch.nn.Parameter] = {}
    peak = 0

    def look(parameters: Iterable[torch.nn.Parameter]) -> None:
        nonlocal peak
        known.update((id(p), p) for p in parameters)
        peak = max(peak, sum(p.data.numel() for p in known.values()))

    release, made = partition_parameters.GatheredParameters.__exit__, partition_parameters.Init._post_init_method

    def released(self: Any, *error: Any) -> Any:
        look(getattr(self, "params", ()))
        return release(self, *error)

    def partition(self: Any, module: torch.nn.Module) -> Any:
        look(module.parameters(recurse=False))
        return made(self, module)

    with (
        mock.patch.object(partition_parameters.GatheredParameters, "__exit__", released),
        mock.patch.object(partition_parameters.Init, "_post_init_method", partition),
    ):
        model = load_frozen(path, deepspeed_json(), VOCABULARY)
    assert {id(p) for p in model.engine.module.parameters()} <= known.keys()
    return peak, sum(p.ds_tensor.numel() for p in model.engine.module.parameters())


def test_no_rank_holds_the_whole_model_while_loading(tmp_path: Path) -> None:
    path = build_model(tmp_path / "teacher", seed=5, hidden=64, layers=12)
    model = AutoModelForCausalLM.from_pretrained(path)
    whole, largest = model.num_parameters(), sum(p.numel() for p in model.model.layers[0].parameters())
    for peak, stays in run_ranks(2, held_while_loading, path):
        assert peak <= largest + 12 * 4 * 64, "more than a layer at a time"  # and placeholders
        assert stays < 0.51 * whole
