"""Processes: who we are, which device we own, and the real `Collective`.

The only module that initialises torch.distributed. Under the DeepSpeed launcher (or torchrun) the environment names the ranks;
without a launcher the process is a world of one.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from katds.parallel.reduce import reduce_all

T = TypeVar("T")


class ProcessCollective:
    """`katds.core.collective.Collective` over torch.distributed.

    Control values travel over a gloo group of their own, so that they need no device memory and never queue behind the
    models' gathers. Rows are exchanged over the default group (NCCL on CUDA).
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        assert group is not None
        self._control: dist.ProcessGroup = group

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return reduce_all(values, torch.add, self._control)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return reduce_all(values, torch.maximum, self._control)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def exchange(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:], device=self._device)
        dist.all_to_all_single(out, rows.to(self._device).contiguous(), list(receive), list(send))
        return out

    def barrier(self) -> None:
        dist.barrier(group=self._control)


@dataclass(frozen=True, slots=True)
class World:
    """This process's place."""

    rank: int
    size: int
    device: torch.device
    collective: ProcessCollective

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(timeout_seconds: float = 1800.0) -> World:
    """Collective: joins the ranks that the launcher started. A rank that is missing or stuck for `timeout_seconds` ends the run."""
    device = _pick_device()
    if not dist.is_initialized():
        _default_environment()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(seconds=timeout_seconds), device_id=device if device.type == "cuda" else None
        )
    _join_deepspeed()
    return World(dist.get_rank(), dist.get_world_size(), device, ProcessCollective(device))


def stop_world() -> None:
    """Leaves the ranks. gloo's threads live on for as long as anything holds a group; see `katds.cli.run_main`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds the generators that libraries may use. katds itself draws only counter-based numbers."""
    random.seed(seed)
    torch.manual_seed(seed)


def _pick_device() -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    # More than one thread per rank oversubscribes the cores that the launcher has already filled with ranks.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))
        )
    return torch.device("cpu")


def _default_environment() -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(random.SystemRandom().randint(20000, 60000)))


def _join_deepspeed() -> None:
    """Hands the existing process group to DeepSpeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed still calls the old names; a line per rank and call site would bury the run's own.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile a shared-memory operator (17 s, needs a compiler) that only inference_all_reduce uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
