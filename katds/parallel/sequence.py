"""Ulysses sequence parallelism (arXiv 2309.14509): neighbouring ranks share a packed micro-batch, a stretch of its tokens each.

All of a transformer but attention works token by token, so that each rank does it for its own stretch. For attention DeepSpeed's all-to-all
turns "all heads of some tokens" into "some heads of all tokens", and back. Weights stay sharded over all ranks: to ZeRO-3 these are
ranks with data of their own, whose gradients it adds up.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from transformers import AutoConfig

from katds.errors import ConfigError
from katds.models.plans import Attend


class UlyssesShards:
    """`katds.models.plans.Shards` of this rank: one of `size` neighbours, from a multiple of it on.

    Cost: of each layer and token 2 (query heads + key heads) x head size elements travel in a forward, and as many in a backward, but for
    the part 1 / size that is here already.
    """

    def __init__(self, size: int) -> None:
        """Collective over all ranks; `size` divides their number."""
        group, _ = dist.new_subgroups(size)
        assert group is not None
        self.rank, self.size = group.rank(), size
        self._exchange = DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1)  # type: ignore[arg-type]

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._exchange(q[None], k[None], v[None], 0, None, attend)
        return out[0]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend) -> torch.Tensor:
    return attend(q[0], k[0], v[0])[None]


def check_shards(size: int, ranks: int, student: Path) -> None:
    """Raises ConfigError where the student at this folder cannot be shared by so many of the ranks. Reads its config.json."""
    if ranks % size:
        raise ConfigError(
            f"train.sequence_parallel is {size}, which does not divide the {ranks} ranks. Give a divisor of them, or 1."
        )
    config = AutoConfig.from_pretrained(student).get_text_config()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or keys % size:
        raise ConfigError(
            f"train.sequence_parallel is {size}, but student.path {student} has {heads} query and {keys} key heads, which do not divide "
            "among so many. Give a divisor of both, or 1."
        )
