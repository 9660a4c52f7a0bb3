"""What is written into a Hugging Face folder of a trained student: its whole weights, and all that is there besides them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, GenerationConfig


@contextmanager
def gathered_state(model: nn.Module) -> Iterator[dict[str, torch.Tensor] | None]:
    """Collective: the full state dict on the CPU of rank 0, one parameter at a time on the device; None elsewhere."""
    is_main = dist.get_rank() == 0
    whole: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main:
                whole[parameter] = parameter.data.detach().cpu().clone()
    # Tied weights share one tensor under both names, so that they are written once.
    yield {name: whole[p] for name, p in model.named_parameters(remove_duplicate=False)} if is_main else None


def save_config(source: Path, folder: Path, tokenizer: Any, end_tokens: Sequence[str]) -> None:
    """Writes all of a model's folder but its weights."""
    config = AutoConfig.from_pretrained(source)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = (source / "generation_config.json").exists()
    generation = (
        GenerationConfig.from_pretrained(source) if given else GenerationConfig(eos_token_id=config.eos_token_id)
    )
    if end_tokens:
        known = generation.eos_token_id
        ids = {*(known if isinstance(known, list) else [known]), *tokenizer.convert_tokens_to_ids(list(end_tokens))}
        generation.eos_token_id = sorted(ids - {None})
    if given or end_tokens:
        generation.save_pretrained(folder)
