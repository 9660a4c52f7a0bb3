"""What a DeepSpeed file says that the plan does not count is told, and what it cannot read is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from messages import refused

from katds.plan import counted
from katds.plan.counted import uncounted
from katds.plan.zero import ZeroSettings

# Of each key a value that DeepSpeed takes and that is not its default; None: what the plan counts, or what changes nothing.
TOLD: dict[str, Any] = {
    "zero_quantized_weights": True, "zero_quantized_nontrainable_weights": True, "zero_quantized_gradients": True,
    "stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": True, "stage3_module_granularity_threshold": 100,
    "stage3_model_persistence_threshold": 1000, "reduce_scatter": False, "memory_efficient_linear": False, "cpu_offload": True,
    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
}  # fmt: skip


def file(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | zero}


@pytest.mark.parametrize("key", TOLD)
def test_what_is_not_counted_is_told(key: str) -> None:
    (line,) = uncounted(file(**{key: TOLD[key]}), "student.deepspeed")
    assert line.startswith(f"not counted: {key}") and "student.deepspeed" in line and "does not know" not in line
    assert ZeroSettings.of(file(**{key: TOLD[key]})).ignored == (line,)


def test_every_key_of_deepspeed_is_counted_or_told() -> None:
    """Of the DeepSpeed that is installed; a new one is told, too, unless it is off."""
    fields = DeepSpeedZeroConfig.model_fields
    defaults = {info.alias or name: info.get_default(call_default_factory=True) for name, info in fields.items()}
    # What is nothing by itself is an empty section here.
    plain = {name: value for name, value in defaults.items() if name not in ("stage", "leaf_module")}
    assert uncounted(file(**plain), "student.deepspeed") == ()
    names = {name.removeprefix("stage3_") for name in defaults}
    assert names - {"stage"} <= counted._COUNTED | counted._HARMLESS | counted._CHANGES.keys()
    (line,) = uncounted(file(zero_hpz_partition_sise=8), "student.deepspeed")
    assert "zero_hpz_partition_sise" in line and "does not know" in line
    lines = uncounted(
        file() | {"torch_autocast": {}, "bf16": {"enabled": True, "bf16_optimizer_states": True}}, "student.deepspeed"
    )
    assert len(lines) == 2 and "torch_autocast" in lines[1] and "bf16_optimizer_states" in lines[0]


def test_a_teacher_has_neither_gradients_nor_an_optimizer() -> None:
    settings = file(zero_quantized_gradients=True, offload_optimizer={"device": "nvme", "ratio": 0.5})
    found = ZeroSettings.of(settings, "teacher.deepspeed", optimizer=False)
    assert found.ignored == () and found.optimizer_on == "device"
    refused(lambda: ZeroSettings.of(settings), "student.deepspeed", "offload_optimizer.device is nvme")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (file(reduce_bucket_size="big"), "reduce_bucket_size is 'big'"),
        (file(offload_param={"device": "disk"}), "offload_param.device is 'disk'"),
        (file() | {"communication_data_type": "float16"}, "communication_data_type is 'float16'"),
        (file() | {"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype is 'fp8'"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, Any], said: str) -> None:
    refused(lambda: ZeroSettings.of(settings, "student.deepspeed"), "student.deepspeed", said)


def test_what_is_read() -> None:
    found = ZeroSettings.of(file(zero_hpz_partition_size=0, reduce_bucket_size="auto"))
    assert (found.secondary, found.bucket, found.gradients, found.communication) == (
        1,
        500_000_000,
        torch.float32,
        torch.float32,
    )
    half = ZeroSettings.of(file() | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}})
    assert (half.gradients, half.communication, half.dtype) == (torch.bfloat16,) * 3
