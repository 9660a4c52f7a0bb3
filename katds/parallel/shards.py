"""Which ranks share one set of a frozen model's shards: all of them, or blocks of neighbours such as the GPUs of a node.

A model in blocks is gathered within each block alone: its forwards are collectives of the block, and one block does not wait for another.

A node is what NCCL takes for one host, and reaches without a network: the ranks that see the same host name and the same boot of the kernel
(or the same NCCL_HOSTID, which stands for both). Launchers that share a host make one node of it; containers that have names of their own
are one each.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import nn

from katds.core.collective import Collective
from katds.errors import ConfigError

Shard = Literal["world", "node"] | int


def check_hpz(config: Mapping[str, Any], size: int, section: str, shard: Shard = "world") -> None:
    """Raises ConfigError where hpZ, a second set of shards in blocks of `zero_hpz_partition_size` ranks, does not fit a world of `size`."""
    ranks = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if ranks in (0, 1):
        return
    if not isinstance(ranks, int) or ranks < 0 or size % min(ranks, size):
        raise ConfigError(
            f"{section}.deepspeed: zero_hpz_partition_size is {ranks!r}, which does not divide the {size} ranks; set it to the ranks of a "
            "node."
        )
    if shard != "world":
        raise ConfigError(
            f"{section}.deepspeed: zero_hpz_partition_size is {ranks}, but {section}.shard is {shard}: its only shards are in such blocks; "
            "remove one of the two."
        )


def block_size(shard: Shard, collective: Collective, section: str) -> int:
    """Collective: how many neighbouring ranks share a model's shards, for the setting `shard` of a recipe's section.

    Raises:
        ConfigError: the ranks cannot be divided like that.
    """
    size = collective.size
    if shard == "world":
        return size
    if shard == "node":
        hosts = hosts_of(collective)
        blocks = [len(list(ranks)) for _, ranks in groupby(hosts)]
        if len(set(blocks)) > 1 or len(blocks) > len(set(hosts)):
            raise ConfigError(
                f"{section}.shard is node, but hosts differ in their number of ranks, or their ranks are no neighbours "
                f"({_by_host(hosts)}); start as many on each, one host after another, or set it to world."
            ).everywhere()
        return blocks[0]
    if size % shard:
        fits = [count for count in range(1, size + 1) if size % count == 0]
        raise ConfigError(
            f"{section}.shard is {shard}, which does not divide the {size} ranks; set it to one of {', '.join(map(str, fits))}."
        ).everywhere()
    return shard


def hosts_of(collective: Collective) -> list[tuple[str, str]]:
    """Collective: what each rank's host is known by."""
    return collective.gather(_host())


def reshard(model: nn.Module, group: dist.ProcessGroup, config: dict[str, Any]) -> None:
    """Collective: moves the parameters of a ZeRO-3 model that is sharded over the world into shards of `group`, which has fewer ranks.

    transformers reads weights into the world's shards only, and it does more than read: it renames, converts, casts and ties. So it
    reads, and each parameter is then gathered over the world, one at a time, and partitioned again. A block has all of the model. Cost:
    each rank receives the model once over the world; besides both sets of shards no more than one parameter is whole at any time.

    Args:
        model: frozen; without an engine. Its parameters are replaced, tied ones stay tied.
        config: DeepSpeed's; says where shards lie (offload_param).
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    first: nn.Parameter | None = None
    for owner, name, parameter in _places(model):
        if parameter not in moved:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = nn.Parameter(parameter.data, requires_grad=False)
                if first is None:
                    first = whole
                    # This partitions the first; the others find its partitioner through it.
                    deepspeed.zero.Init(
                        nn.ParameterList([whole]), data_parallel_group=group, config_dict_or_path=config
                    )
                else:
                    first.convert_to_zero_parameters(param_list=[whole])  # type: ignore[attr-defined]
            # DeepSpeed's parameters are in reference cycles: the old shard would stay until they are collected.
            parameter.ds_tensor = None  # type: ignore[attr-defined]
            moved[parameter] = whole
        owner._parameters[name] = moved[parameter]


@contextmanager
def compared_within(group: dist.ProcessGroup) -> Iterator[None]:
    """For a forward of a model in blocks. DeepSpeed records the order of modules in the first forwards, and compares it with rank 0 of the
    world, for which a block would wait; within the context, with the first rank of `group`."""
    before = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = partial(_assert_same, group)
    try:
        yield
    finally:
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = before


def _assert_same(group: dist.ProcessGroup, ints: list[int]) -> None:
    first = [ints]
    dist.broadcast_object_list(first, group=group, group_src=0)
    if first[0] != ints:
        raise RuntimeError(
            f"rank {dist.get_rank()} runs the teacher's modules in another order than the first rank of its block"
        )


def _places(model: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Parameter]]:
    """Every name of every parameter, in the order of modules; the list is made before anything is replaced."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _host() -> tuple[str, str]:
    """The same for processes of one host only: its name, for people, and what tells hosts of one name from each other."""
    if given := os.environ.get("NCCL_HOSTID"):
        return given, ""
    name = socket.gethostname()
    with suppress(OSError):  # not Linux
        return name, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return name, ""


def _by_host(hosts: Sequence[tuple[str, str]]) -> str:
    """The first runs of ranks, by host."""
    blocks = [
        (name, [rank for rank, _ in ranks]) for (name, _), ranks in groupby(enumerate(hosts), lambda each: each[1])
    ]
    said = [
        f"{name}: {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{name}: {ranks[0]}" for name, ranks in blocks[:8]
    ]
    return "; ".join(said) + ("; ..." if len(blocks) > 8 else "")
