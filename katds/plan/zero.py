"""What DeepSpeed's ZeRO-3 holds of a model on one rank, and how much of it is gathered at once (deepspeed 0.19)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from katds.errors import ConfigError
from katds.parallel.deepspeed_config import model_dtype
from katds.plan.counted import uncounted
from katds.plan.models import ModelShape, Order


@dataclass(frozen=True)
class ZeroSettings:
    """What of DeepSpeed's JSON decides about memory; elements where it says so, with DeepSpeed's defaults.

    Args:
        optimizer_on, parameters_on: "device", "cpu" or "nvme".
        pinned_parameters, pinned_optimizer: what of them lies on the host is page-locked.
        gradients: type in which a rank adds them up; communication: in which they are reduced.
        secondary: ranks of a group that holds all weights once more after a gather (hpZ); 1: none does.
        host_limit: of the parameters on NVMe a student keeps so many on the host; swap: through so many others pass. Elements.
        ignored: what the plan does not count, and what that would change.
    """

    dtype: torch.dtype
    bucket: int  # elements
    contiguous: bool
    prefetch: int  # elements
    persistent: int  # elements up to which a parameter stays whole on every rank
    most_live: int  # elements
    reuse: int  # elements
    sub_group: int  # elements
    optimizer_on: str
    parameters_on: str
    pinned_parameters: bool
    pinned_optimizer: bool
    gradients: torch.dtype
    communication: torch.dtype
    overlap: bool
    secondary: int
    host_limit: int
    swap: int
    ignored: tuple[str, ...]

    @classmethod
    def of(
        cls, user: dict[str, Any], field: str = "student.deepspeed", device: str = "cuda", optimizer: bool = True
    ) -> ZeroSettings:
        """Raises ConfigError, naming the setting `field`.

        Args:
            user: the file as read by `katds.parallel.deepspeed_config.read_deepspeed_json`.
            device: "cpu": its memory is the host's, so that parameters there are where they would be anyway.
            optimizer: the model is trained.
        """
        zero, dtype = user["zero_optimization"], model_dtype(user)
        blocks = {name: zero.get(name) or {} for name in ("offload_param", "offload_optimizer")}
        parameters, states = (_place(block, f"{field}: {name}") for name, block in blocks.items())
        if optimizer and states == "nvme":
            raise ConfigError(
                f"{field}: offload_optimizer.device is nvme, which a run refuses: DeepSpeed updates weights wrongly there. Set it to cpu."
            )
        if device == "cpu" and parameters == "cpu":
            parameters = "device"

        def locked(name: str) -> bool:
            return device == "cuda" and blocks[name].get("pin_memory") is not False

        def number(name: str, default: float, section: dict[str, Any] = zero) -> int:
            value = section.get(f"stage3_{name}", section.get(name, default))
            value = default if value == "auto" else value
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{field}: {name} is {value!r}. Give a number, or remove it.")
            return int(value)

        def data_type(value: Any, name: str, default: torch.dtype) -> torch.dtype:
            if value is None:
                return default
            if value not in _TYPES:
                raise ConfigError(f"{field}: {name} is {value!r}. Give one of {', '.join(_TYPES)}, or remove it.")
            return _TYPES[value]

        types = user.get("data_types") or {}
        buffers = blocks["offload_param"] if parameters == "nvme" else {"buffer_count": 0}
        return cls(
            dtype, number("reduce_bucket_size", 5e8), zero.get("contiguous_gradients", True), number("prefetch_bucket_size", 5e7),
            number("param_persistence_threshold", 1e5), number("max_live_parameters", 1e9), number("max_reuse_distance", 1e9),
            number("sub_group_size", 1e9), states if optimizer else "device", parameters,
            locked("offload_param"), locked("offload_optimizer"),
            data_type(types.get("grad_accum_dtype"), "data_types.grad_accum_dtype", torch.float32),
            data_type(user.get("communication_data_type"), "communication_data_type", dtype),
            zero.get("overlap_comm") is not False, max(1, number("zero_hpz_partition_size", 1)),
            number("max_in_cpu", 1e9, buffers) if optimizer else 0,
            number("buffer_count", 5, buffers) * number("buffer_size", 1e8, buffers), uncounted(user, field, optimizer),
        )  # fmt: skip

    @property
    def away(self) -> bool:
        """Shards lie apart from the device: what is gathered is a copy, even with one rank."""
        return self.parameters_on != "device"


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bfp16": torch.bfloat16, "fp16": torch.float16}


def _place(section: dict[str, Any], where: str) -> str:
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(f"{where}.device is {device!r}; set it to one of none, cpu, nvme.")
    return "device" if device == "none" else str(device)


def shard(sizes: Iterable[int], ranks: int) -> int:
    """Elements of a rank's partitions: every parameter is padded to a multiple of the ranks."""
    return sum(-(-size // ranks) for size in sizes)


def sub_groups(sizes: Iterable[int], ranks: int, limit: int) -> list[int]:
    """Elements of a rank's parts of what the optimizer updates at a time: whole parameters, until they are `limit` elements or more."""
    found = [0]
    for size in sizes:
        if found[-1] and found[-1] >= limit:
            found.append(0)
        found[-1] += -(-size // ranks)
    return found


def gathered(sizes: Iterable[int], ranks: int, away: bool = False) -> int:
    """Elements of all parameters gathered together; with one rank they are the shard itself, unless that is `away`."""
    return 0 if ranks == 1 and not away else sum(-(-size // ranks) * ranks for size in sizes)


def persistent(shape: ModelShape, settings: ZeroSettings, ranks: int) -> int:
    """Elements of the parameters that are small enough to stay whole beside their shards."""
    return gathered((size for size in shape.sizes if size <= settings.persistent), ranks, settings.away)


def on_disk(elements: int, settings: ZeroSettings) -> int:
    """Of a shard of so many elements, those that lie on NVMe."""
    return max(0, elements - settings.host_limit) if settings.parameters_on == "nvme" else 0


@dataclass(frozen=True)
class Gathers:
    """What one pass over a model gathers, besides the persistent parameters.

    Args:
        most: the most elements that are there at a time.
        sizes: of every parameter that is gathered, as often as it is.
        calls: all-gathers; what is asked for together travels together.
    """

    most: int
    sizes: tuple[int, ...]
    calls: int


def gathers(order: Order, settings: ZeroSettings, ranks: int) -> Gathers:
    """Of a forward, or of a forward and its backward, in the order in which they enter modules (`ModelShape.forward_order`).

    DeepSpeed's own rule, once it knows the order: each module fetches its parameters and then up to a prefetch bucket of those that follow,
    while fewer than max_live_parameters are there; having run, it lets go of what is not used again within max_reuse_distance, unless
    the prefetch has already passed over its next use.
    """
    if ranks == 1 and not settings.away:
        return Gathers(0, (), 0)
    # The model itself enters first, without parameters of its own.
    order = [[], *([(name, size) for name, size in own if size > settings.persistent] for own in order)]
    uses = [(at, *use) for at, own in enumerate(order) for use in own]
    there: dict[int, int] = {}
    passed: dict[int, int] = {}  # parameter -> the last use of it that the prefetch has seen
    came: list[int] = []
    used = seen = most = calls = 0  # the first two are places in `uses`
    for at, own in enumerate(order):
        missing = {name: size for name, size in own if name not in there}
        there |= missing
        came += missing.values()
        used += len(own)
        seen = max(seen, used)
        passed |= {name: at for name, _ in own if passed.get(name, -1) < at}
        most = max(most, sum(there.values()))
        limit, ahead = min(settings.most_live - sum(there.values()), settings.prefetch), 0
        while seen < len(uses) and ahead < limit:
            use, name, size = uses[seen]
            seen += 1
            passed[name] = max(passed.get(name, -1), use)
            if name not in there:
                there[name] = size
                came.append(size)
                ahead += size
        calls += bool(missing) + (ahead > 0)
        most = max(most, sum(there.values()))
        for name in _done(own, order[at + 1 :], settings.reuse):
            if passed[name] <= at + 1:
                there.pop(name, None)
    return Gathers(most, tuple(came), calls)


def _done(own: Sequence[tuple[int, int]], later: Order, reuse: int) -> set[int]:
    """The module's parameters that are not used again within `reuse` elements."""
    names, passed = {name for name, _ in own}, 0
    for module in later:
        if not names or passed >= reuse:
            break
        for name, size in module:
            names.discard(name)
            passed += size
    return names
