"""What planning says of ZeRO-3, against DeepSpeed's own engines on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from ranks import run_ranks
from transformers import AutoConfig
from zoo import build_model, optimizer

from katds.models.causal import linear
from katds.models.plans import PackedPlan
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen, load_student
from katds.plan.models import ModelShape
from katds.plan.zero import ZeroSettings, gathered, gathers, persistent, shard

LAYERS, RANKS = 6, 2
ZERO = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 30_000}
# Parameters of the model have 8 to 2080 elements.
GATHERS = [
    {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000},
    {"stage3_param_persistence_threshold": 40, "stage3_prefetch_bucket_size": 0},
    {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4000, "stage3_max_live_parameters": 9000},
    {
        "stage3_param_persistence_threshold": 40, "stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 9000,
        "stage3_max_reuse_distance": 20_000,
    },
    {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000, "stage3_max_reuse_distance": 1000},
]  # fmt: skip


def config(**gathers: int) -> dict[str, Any]:
    return {"zero_optimization": ZERO | gathers}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=1, layers=LAYERS, tied=request.param)


def shape_of(folder: Path) -> ModelShape:
    return ModelShape.read(folder, torch.float32, "student.path")


def test_shards_and_what_the_optimizer_holds(folder: Path) -> None:
    """On three ranks: most parameters do not divide by three."""
    settings, ranks = GATHERS[1], 3
    found = run_ranks(ranks, _held, folder, config(**settings))[0]
    shape, zero = shape_of(folder), ZeroSettings.of(config(**settings))
    own = shard(shape.sizes, ranks)
    assert found["shard"] == found["gradients"] == found["master"] == own
    assert found["moments"] == 2 * own
    assert found["bucket"] == zero.bucket
    assert found["persistent"] == persistent(shape, zero, ranks) > 0
    assert found["view"] == gathered(shape.sizes, ranks)
    assert found["types"] == ["torch.float32"]


def _held(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    start_world()
    student = load_student(folder, settings, 65, optimizer(), checkpointing=False)
    _learn(student)
    zero, parameters = student.engine.optimizer, list(student.engine.module.parameters())
    there = sum(p.untyped_storage().nbytes() // 4 for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
    moments = [v for state in zero.optimizer.state.values() for v in state.values() if v.numel() > 1]
    with student.decoding() as view:
        whole = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // 4 for p in view.parameters()}
    buffers = [zero.grad_partitions_flat_buffer, *zero.fp32_partitioned_groups_flat, *moments]
    return {
        "shard": sum(p.ds_tensor.numel() for p in parameters),
        "gradients": zero.grad_partitions_flat_buffer.numel(),
        "master": sum(flat.numel() for flat in zero.fp32_partitioned_groups_flat),
        "moments": sum(v.numel() for v in moments),
        "bucket": sum(bucket.buffer.numel() for bucket in zero.ipg_buckets.values()),
        "persistent": there,
        "view": sum(whole.values()),
        "types": sorted({str(buffer.dtype) for buffer in buffers}),
    }  # fmt: skip


@pytest.mark.parametrize("settings", GATHERS, ids=range(len(GATHERS)))
def test_gathered_layers_of_a_frozen_model(folder: Path, settings: dict[str, int]) -> None:
    (found, _) = run_ranks(RANKS, _forwards, folder, config(**settings))
    predicted = gathers(shape_of(folder).forward_order, ZeroSettings.of(config(**settings)), RANKS).most
    assert found == predicted


@pytest.mark.parametrize("settings", GATHERS, ids=range(len(GATHERS)))
def test_gathered_layers_of_an_update(folder: Path, settings: dict[str, int]) -> None:
    (found, _) = run_ranks(RANKS, _updates, folder, config(**settings))
    predicted = gathers(shape_of(folder).update_order, ZeroSettings.of(config(**settings)), RANKS).most
    assert found == predicted


def _forwards(folder: Path, settings: dict[str, Any]) -> int:
    start_world()
    frozen = load_frozen(folder, settings, 65)
    watch = _Watch(frozen.engine.module)
    for _ in range(4):  # DeepSpeed looks ahead once it has seen a forward or two
        frozen(**_packed())
    return watch.most


def _updates(folder: Path, settings: dict[str, Any]) -> int:
    start_world()
    student = load_student(folder, settings, 65, optimizer(), checkpointing=False)
    watch = _Watch(student.engine.module)
    for _ in range(4):
        _learn(student)
    return watch.most


def _learn(student: Any) -> None:
    student.backward(learning_loss(student), last=True)
    student.step(1e-3)


def learning_loss(student: Any) -> torch.Tensor:
    loss: torch.Tensor = student.forward(**_packed() | {"head": lambda *given: linear(*given).logsumexp(-1).sum()})
    return loss


def _packed() -> dict[str, Any]:
    tokens = torch.arange(12)
    return {
        "input_ids": tokens,
        "position_ids": tokens,
        "plan": PackedPlan.of([12], torch.device("cpu")),
        "head": linear,
    }


class _Watch:
    """The most elements that are gathered, or on their way, whenever a module begins."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.most = 0
        self._parameters = list(model.parameters())
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: self._look())
            module.register_full_backward_hook(lambda *_: self._look())

    def _look(self) -> None:
        here = (ZeroParamStatus.AVAILABLE, ZeroParamStatus.INFLIGHT)
        count = sum(p.ds_numel for p in self._parameters if p.ds_status in here and not p.ds_persist)
        self.most = max(self.most, count)


def test_what_it_reads_of_a_configuration(folder: Path) -> None:
    model = AutoConfig.from_pretrained(folder)
    shape = shape_of(folder)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (LAYERS, model.hidden_size, model.vocab_size)
    (written,) = folder.glob("*.safetensors")
    assert abs(written.stat().st_size - shape.bytes) < 20_000  # its header
