"""A run's checkpoint as a Hugging Face folder, so that whatever reads models reads it: evaluation, transformers, vLLM."""

from __future__ import annotations

import contextlib
import io
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from katds.cli import read_recipe
from katds.errors import CheckpointError, ConfigError, first_sentence
from katds.parallel.checkpoint import TAG, complete_steps
from katds.parallel.deepspeed_config import model_dtype
from katds.parallel.model_folder import save_config

FOLDER = "model"  # below the checkpoint, with which it is pruned


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: its own Hugging Face folder, or a checkpoint and the folder that its run began with.

    base: the folder with configuration and tokenizer, and with the weights where there is no checkpoint.
    """

    base: Path
    checkpoint: Path | None = None


def find_model(path: Path) -> ModelSource:
    """A Hugging Face folder; a checkpoint `step-N`; or the newest checkpoint of a run, given its folder or its `checkpoints`.

    Raises ConfigError where the model that the run began with is gone: its configuration and tokenizer are needed.
    """
    if (path / "config.json").exists():
        return ModelSource(path)
    checkpoint = path if (path / "state.json").exists() else _newest(path)
    if checkpoint is None:
        return ModelSource(path)  # whoever checks the folder says what it lacks
    base = Path(read_recipe(checkpoint / "config.yaml")["student"]["path"])
    if not (base / "config.json").exists():
        raise ConfigError(
            f"student.path is {path}, a checkpoint of a run whose own student.path was {base}, which is no model folder (seen from "
            f"{Path.cwd()}). Its configuration and tokenizer are needed: bring it back there."
        )
    return ModelSource(base, checkpoint)


def as_folder(source: ModelSource) -> Path:
    """The model as a Hugging Face folder. A checkpoint's is written on first use, into the checkpoint; rank 0 alone may call this.

    Cost: the weights once on disk, in the type that the run trained with; in memory those, and the checkpoint's fp32 weights mapped.

    Raises CheckpointError if DeepSpeed cannot put the shards together.
    """
    if source.checkpoint is None:
        return source.base
    target = source.checkpoint / FOLDER
    if not target.exists():
        # A name of its own: two evaluations of one checkpoint may begin together, and one must not take the other's half.
        partial = target.with_name(f"{FOLDER}-{uuid.uuid4().hex}.partial")
        try:
            _write(source.checkpoint, source.base, partial)
        except Exception as error:  # DeepSpeed's and torch's own kinds
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{source.checkpoint} cannot be put together ({type(error).__name__}: {first_sentence(error)}). Give another checkpoint."
            ) from error
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            if not target.exists():
                raise
    return target


def _newest(path: Path) -> Path | None:
    for folder in (path / "checkpoints", path):
        if steps := complete_steps(folder):
            return folder / f"step-{max(steps)}"
    return None


def _write(checkpoint: Path, base: Path, folder: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    dtype = _trained_dtype(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every file
        shards = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG, lazy_mode=True)
    whole: dict[int, Any] = {}
    state = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        shard = shards[f"model.{name}"]
        # Tied weights are one object under both names, and must stay one tensor to be written once.
        if id(shard) not in whole:
            whole[id(shard)] = shard.contiguous().to(dtype)
        state[name] = whole[id(shard)]
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    ends = read_recipe(checkpoint / "config.yaml").get("rollout", {}).get("end_tokens", [])
    save_config(base, folder, AutoTokenizer.from_pretrained(base), ends)


def _trained_dtype(checkpoint: Path) -> torch.dtype:
    """Of the weights in the forward pass; the checkpoint's own are fp32 in any case."""
    file = sorted((checkpoint / TAG).glob("*_model_states.pt"))[0]
    return model_dtype(torch.load(file, map_location="cpu", mmap=True, weights_only=False)["ds_config"])
