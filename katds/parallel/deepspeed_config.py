"""DeepSpeed's JSON: the user's file says ZeRO, precision and offload; the recipe says all the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from katds.errors import ConfigError, first_sentence

# Owned by the recipe: two places for one number is one too many.
_RECIPE_OWNED = {
    "train_batch_size": "rollout.prompts_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "gradient_clipping": "train.optimizer.gradient_clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer",
    # With these DeepSpeed divides gradients by the ranks / sequence_parallel_size.
    "sequence_parallel_size": "train.sequence_parallel",
    "data_parallel_size": "train.sequence_parallel",
}


def read_deepspeed_json(path: Path, field: str) -> dict[str, Any]:
    """The user's file, checked: ZeRO stage 3, nothing that the recipe owns, fp16 refused."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{field}: there is no file {path}; see ds_configs/ for files that work.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{field}: {path} line {error.lineno} is not JSON ({error.msg}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path} cannot be read ({first_sentence(error)}); name a JSON file.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{field}: {path} holds no JSON object; see ds_configs/ for files that work.")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"{field}: {path} sets {key!r} to {config[key]!r}; it must be a JSON object.")
    for key, owner in _RECIPE_OWNED.items():
        if key in config:
            raise ConfigError(
                f"{field}: {path} sets {key!r}, which the recipe owns; remove it and set {owner} instead."
            )
    if config.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(
            f"{field}: {path} does not set zero_optimization.stage to 3, the only stage that katds runs on."
        )
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(block := config["zero_optimization"].get(key, {}), dict):
            raise ConfigError(f"{field}: {path} sets {key!r} to {block!r}; it must be a JSON object.")
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"{field}: {path} enables fp16, whose loss scaling katds does not support; use bf16 or neither."
        )
    return config


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def student_config(user: dict[str, Any], gradient_clip: float | None) -> dict[str, Any]:
    """Adds what DeepSpeed demands. Losses arrive already divided by the global token count, hence no gas scaling."""
    return {
        **user,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # Under bf16 DeepSpeed would otherwise add up micro-batches in bf16.
        "data_types": {"grad_accum_dtype": "fp32", **user.get("data_types", {})},
    }


def teacher_config(user: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in user.items() if key not in ("data_types", "checkpoint")}
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    return {**config, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}


def without_nvme(config: dict[str, Any]) -> dict[str, Any]:
    """For weights that will not stay where they are read to: parameters on the host instead of on NVMe."""
    zero = dict(config["zero_optimization"])
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        zero["offload_param"] = {"device": "cpu"}
    return {**config, "zero_optimization": zero}
