"""Measures the machine at hand for `katds.plan.hardware`: matrix products, memory, and collectives where there are several ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from katds.parallel.shards import hosts_of
from katds.parallel.world import start_world
from katds.plan.hardware import Profile

SIDE = {"cpu": 768, "cuda": 8192}  # of the matrices
READ = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes
GATHERED = {"cpu": 1 << 23, "cuda": 1 << 28}  # bytes of every rank
WORDS, ROWS = 256, 1  # of logits whose sampling costs next to nothing but its calls


def measure() -> Profile:
    """Collective. Rates of the slowest rank, while all ranks measure at once, as they do in a run."""
    world = start_world()
    device, collective = world.device, world.collective

    def slowest(run: Callable[[], Any], repetitions: int = 5) -> float:
        taken = []
        for _ in range(repetitions + 1):
            _settle(device)
            collective.barrier()
            start = time.perf_counter()
            run()
            _settle(device)
            taken.append(time.perf_counter() - start)
        mine = statistics.median(taken[1:])
        return float(collective.max(torch.tensor([mine], dtype=torch.float64)))

    kind = device.type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = torch.randn(2, SIDE[kind], SIDE[kind], device=device).to(dtype)
    flops = 2 * SIDE[kind] ** 3 / slowest(lambda: a @ b)
    source = torch.zeros(READ[kind] // 8, dtype=torch.int64, device=device)
    bandwidth = READ[kind] / slowest(source.sum)
    inside, latency = float("1e12"), 0.0
    if collective.size > 1:
        small = torch.zeros(8, dtype=torch.int64)
        latency = slowest(lambda: collective.sum(small), 20) / (collective.size - 1).bit_length()
        rows = torch.zeros(collective.size, GATHERED[kind], dtype=torch.uint8, device=device)
        once = [1] * collective.size
        inside = GATHERED[kind] * (collective.size - 1) / slowest(lambda: collective.exchange(rows, once, once))
    link = bandwidth if kind == "cpu" else _link(device, slowest)
    nodes = len(set(hosts_of(collective)))
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "cpu"
    devices = collective.size // nodes
    words = torch.zeros(READ["cpu"] // 8, dtype=torch.int64)
    host_bandwidth = devices * READ["cpu"] / slowest(words.sum)
    return Profile(
        name, kind, _memory(device, devices), flops, bandwidth, devices, inside, inside, latency, slowest(lambda: _sample(device)),
        kind == "cuda", f"measured on {collective.size} ranks, torch {torch.__version__}; disks are assumed", _host_memory(),
        host_bandwidth, link, measured_ranks=collective.size, measured_nodes=nodes,
    )  # fmt: skip


def _link(device: torch.device, slowest: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes/s from page-locked memory of the host to the device."""
    words = torch.zeros(READ["cpu"] // 8, dtype=torch.int64, pin_memory=True)
    return READ["cpu"] / slowest(lambda: words.to(device))


def _sample(device: torch.device) -> torch.Tensor:
    from katds.rollout.sampling import Sampling, sample_step

    return sample_step(
        torch.zeros(ROWS, WORDS, device=device), torch.full((ROWS,), 0.5, device=device), Sampling(), 64
    ).tokens_S


def _memory(device: torch.device, ranks: int) -> int:
    """Bytes that a rank may have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _host_memory() // ranks


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
