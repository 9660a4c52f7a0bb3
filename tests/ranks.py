"""Runs a plain function on several gloo ranks, forked after the imports: 0.1-3 s per test instead of 8-16 s."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from katds.bench.ranks import on_ranks

TIMEOUT_SECONDS = 120.0  # a hang is a failure


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) on every rank of a world of `size`; returns the results in rank order. Results must be picklable."""
    _import_once()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        children = [
            context.Process(target=_child, args=(rank, size, f"{folder}/store", queue, function, args))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        try:
            results = dict(queue.get(timeout=TIMEOUT_SECONDS) for _ in children)
        finally:
            for child in children:
                child.join(timeout=5)
                if child.is_alive():
                    child.kill()
    for rank, (ok, value) in sorted(results.items()):
        if not ok:
            raise AssertionError(f"rank {rank} failed:\n{value}")
    return [results[rank][1] for rank in range(size)]


@cache
def _import_once() -> None:
    """What every run would import anew after the fork, for 5 to 10 s: DeepSpeed's Muon compiles with torch._dynamo, its operators ask the
    compiler what they could be made with."""
    import datasets  # noqa: F401
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer

    assert deepspeed.ops.__compatible_ops__


def run_alone(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a world of one on "cpu" (gloo) or "cuda" (NCCL), in a fresh process: a forked one could not use CUDA."""
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        if device == "cuda":
            del os.environ["DS_ACCELERATOR"]
        return on_ranks(1, function, *args)[0]


def _child(rank: int, size: int, store: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        queue.put((rank, (True, function(*args))))
    except BaseException:
        queue.put((rank, (False, traceback.format_exc())))
    finally:
        queue.close()
        queue.join_thread()
        os._exit(0)  # DeepSpeed's exit handlers would wait for ranks that have failed
