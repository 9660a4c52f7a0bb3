"""Processes: who we are, which device we own, and the real `Collective`.

The only module that initialises torch.distributed. Under the DeepSpeed launcher (or torchrun) the environment names the ranks;
without a launcher the process is a world of one.
"""

from __future__ import annotations

import os
import random
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from katds.errors import KatdsError
from katds.parallel.heartbeat import Heartbeat
from katds.parallel.reduce import reduce_all
from katds.parallel.rendezvous import meet

T = TypeVar("T")
_heartbeat: Heartbeat | None = None  # of this process, as torch's default process group is


class ProcessCollective:
    """`katds.core.collective.Collective` over torch.distributed, of all ranks or of a block of neighbours.

    Control values travel over a gloo group of their own, so that they need no device memory and never queue behind the
    models' gathers. Rows are exchanged over `group` (NCCL on CUDA).

    Args:
        block: with it, the collective is that of `block` neighbouring ranks, from a multiple of it on; it divides the world. All
            ranks make it together.
    """

    def __init__(self, device: torch.device, block: int | None = None) -> None:
        self._device = device
        if block is None:
            group, control = dist.group.WORLD, None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        else:
            group, _ = dist.new_subgroups(block)
            control = None if dist.get_backend() == "gloo" else dist.new_subgroups(block, backend="gloo")[0]
        assert group is not None
        self.group: dist.ProcessGroup = group
        self._control: dist.ProcessGroup = control or group
        self.rank, self.size = group.rank(), group.size()

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
        dist.all_to_all_single(out, rows.to(self._device).contiguous(), list(receive), list(send), group=self.group)
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
    _blocks: dict[int, ProcessCollective] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def block(self, size: int) -> ProcessCollective:
        """Collective the first time that a size is asked for: the `size` neighbouring ranks that this one is among.

        `size` divides the world: ranks 0 .. size-1 are the first block. A block of the whole world is `collective` itself.
        """
        if size == self.size:
            return self.collective
        if size not in self._blocks:
            self._blocks[size] = ProcessCollective(self.device, size)
        return self._blocks[size]


def start_world(
    timeout_seconds: float = 1800.0,
    lost_after_seconds: float = 0.0,
    advice: str = "Start it again on the hosts that are left.",
) -> World:
    """Collective: joins the ranks that the launcher started. A rank that is missing or stuck for `timeout_seconds` ends the run; one that
    is gone does so after `lost_after_seconds` (0: not watched for), with a line for the user that closes with `advice`."""
    global _heartbeat
    device = _pick_device()
    if not dist.is_initialized():
        _default_environment()
        backend, alone = "nccl" if device.type == "cuda" else "gloo", os.environ["WORLD_SIZE"] == "1"
        met = None if alone else meet(timeout_seconds)
        store, rank, size = (met.store, met.rank, len(met.hosts)) if met is not None else (None, -1, -1)
        if met is not None and lost_after_seconds > 0:
            # A connection of its own: requests over the process groups' wait for each other. Before these are made, which
            # waits for all ranks as a collective does.
            mine = met.store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            _heartbeat = Heartbeat(mine, met.rank, met.hosts, lost_after_seconds, advice)
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
            store=store,
            rank=rank,
            world_size=size,
        )
    _join_deepspeed()
    return World(dist.get_rank(), dist.get_world_size(), device, ProcessCollective(device))


def at_loss(action: Callable[[], object]) -> None:
    """Should ranks be lost, which ends this process while its main thread waits for them, `action` is done before, if it is quick."""
    if _heartbeat is not None:
        _heartbeat.last_words = action


def report_traffic() -> None:
    """Collective: rank 0 prints DeepSpeed's table of its collectives, where a DeepSpeed file has turned comms_logger on."""
    import deepspeed.comm

    if deepspeed.comm.comms_logger.enabled:
        deepspeed.comm.log_summary()


@contextmanager
def closing_world() -> Iterator[None]:
    """Around a program: leaves the ranks at its end, and tells them where an error ends it."""
    try:
        yield
    except BaseException as error:
        if _heartbeat is not None:
            if isinstance(error, KatdsError) and error.reported_by is not None:
                _heartbeat.stop()  # all of them have it
            else:
                _heartbeat.fail(error)
        raise
    stop_world()


def stop_world() -> None:
    """Leaves the ranks. gloo's threads live on for as long as anything holds a group; see `katds.cli.run_main`."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds the generators that libraries may use. katds itself draws only counter-based numbers."""
    random.seed(seed)
    torch.manual_seed(seed)


def _pick_device() -> torch.device:
    # More threads oversubscribe the cores among which the launcher has already divided ranks; an offloaded optimizer has some as well.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(
                1,
                len(os.sched_getaffinity(0))
                // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))),
            )
        )
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _default_environment() -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(random.SystemRandom().randint(20000, 60000)))


def _join_deepspeed() -> None:
    """Hands the existing process group to DeepSpeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (
        shutil.which("ninja") is None
    ):  # which compiles DeepSpeed's operators, and lies beside python where .venv is not activated
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    # DeepSpeed still calls the old names; a line per rank and call site would bury the run's own.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile a shared-memory operator (17 s, needs a compiler) that only inference_all_reduce uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
