"""The user's DeepSpeed JSON: what it may say, and what is added to it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import refused

from katds.parallel.deepspeed_config import model_dtype, read_deepspeed_json, student_config, teacher_config

SHIPPED = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))
ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_read(path: Path) -> None:
    config = read_deepspeed_json(path, "student.deepspeed")
    assert model_dtype(config) is (torch.bfloat16 if "bf16" in path.name else torch.float32)


def test_both_precisions_are_shipped() -> None:
    assert {"zero3_bf16.json", "zero3_fp32.json"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        ("{", ["line 1", "not JSON"]),
        ("[]", ["no JSON object"]),
        ({}, ["zero_optimization.stage to 3"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage to 3"]),
        ({"zero_optimization": 3}, ["'zero_optimization' to 3"]),
        (ZERO3 | {"bf16": True}, ["'bf16' to True"]),
        (ZERO3 | {"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        (ZERO3 | {"gradient_clipping": 1.0}, ["'gradient_clipping'", "train.optimizer.gradient_clip"]),
        (ZERO3 | {"train_batch_size": 8}, ["'train_batch_size'", "rollout.prompts_per_step"]),
        (ZERO3 | {"train_micro_batch_size_per_gpu": 8}, ["train.micro_batch_tokens"]),
        (ZERO3 | {"gradient_accumulation_steps": 8}, ["train.micro_batch_tokens"]),
        (ZERO3 | {"optimizer": {}}, ["'optimizer'", "train.optimizer"]),
        (ZERO3 | {"scheduler": {}}, ["'scheduler'", "train.optimizer"]),
        (ZERO3 | {"sequence_parallel_size": 2}, ["'sequence_parallel_size'", "train.sequence_parallel"]),
        (ZERO3 | {"data_parallel_size": 2}, ["'data_parallel_size'", "train.sequence_parallel"]),
    ],
)
def test_what_katds_cannot_run_is_refused(tmp_path: Path, content: Any, pieces: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    refused(lambda: read_deepspeed_json(path, "teacher.deepspeed"), "teacher.deepspeed", str(path), *pieces)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    refused(lambda: read_deepspeed_json(tmp_path / "none.json", "student.deepspeed"), "student.deepspeed", "none.json")
    refused(lambda: read_deepspeed_json(tmp_path, "student.deepspeed"), "student.deepspeed", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_deepspeed_json(tmp_path / "binary", "student.deepspeed"), "student.deepspeed", "binary")


def test_student_adds_micro_batches_in_fp32_and_clips_as_told() -> None:
    user = ZERO3 | {"bf16": {"enabled": True}, "data_types": {}, "wall_clock_breakdown": True}
    before = copy.deepcopy(user)
    config = student_config(user, 0.5)
    assert config["data_types"]["grad_accum_dtype"] == "fp32" and config["gradient_clipping"] == 0.5
    assert config["wall_clock_breakdown"] is True
    assert student_config(user, None)["gradient_clipping"] == 0.0  # DeepSpeed's default is 1
    assert user == before
    assert student_config(ZERO3 | {"data_types": {"grad_accum_dtype": "bf16"}}, None)["data_types"] == {
        "grad_accum_dtype": "bf16"
    }


def test_teacher_has_neither_optimizer_nor_its_offload() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    user = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {"parallel_write": {}}}
    before = copy.deepcopy(user)
    config = teacher_config(user)
    assert config["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert not {"data_types", "checkpoint", "optimizer", "gradient_clipping"} & config.keys()
    assert user == before
