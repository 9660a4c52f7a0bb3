"""Runs a function on several ranks of this machine and collects what they return. Importing it is cheap."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) on every rank of a fresh world of `ranks`, one thread each on the CPU; results in rank order.

    `function` joins the world itself (`katds.parallel.world.start_world`), must be importable, and its results picklable. A rank that
    fails ends the others and raises here.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(_child, (ranks, _free_port(), folder, function, args), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _child(rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = function(*args)
    from katds.cli import end_process
    from katds.parallel.world import stop_world

    stop_world()
    torch.save(result, Path(folder) / f"{rank}.pt")
    end_process(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
