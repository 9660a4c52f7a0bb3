"""The real collective is the protocol of `katds.core.collective`, and errors on rank 0 reach every rank."""

from __future__ import annotations

import atexit
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from local_ranks import LocalRank, run_local
from ranks import run_alone, run_ranks

from katds.errors import ConfigError, KatdsError
from katds.parallel.agree import on_main, same_everywhere, together, visible_everywhere
from katds.parallel.reduce import reduce_all
from katds.parallel.world import start_world


def collectives() -> Any:
    world = start_world()
    own = torch.tensor([float(world.rank), 2.0**53 - 1 if world.rank == 0 else 1.0], dtype=torch.float64)
    one = own.clone()
    total = world.collective.sum(own)
    assert torch.equal(own, one), "an argument was overwritten"
    # Rank r sends s + 1 rows that hold 10 r + s to rank s; rank 0 sends nothing.
    send = [0 if world.rank == 0 else s + 1 for s in range(world.size)]
    rows = torch.tensor([10 * world.rank + s for s, count in enumerate(send) for _ in range(count)], dtype=torch.int32)
    receive = [0 if r == 0 else world.rank + 1 for r in range(world.size)]
    world.collective.barrier()
    return {
        "world": (world.rank, world.size, world.is_main, str(world.device)),
        "sum": total.tolist(),
        "max": world.collective.max(own).tolist(),
        "gather": world.collective.gather({"rank": world.rank}),
        "exchange": world.collective.exchange(rows[:, None].expand(-1, 2), send, receive).tolist(),
        "nothing": world.collective.exchange(rows[:0], [0] * world.size, [0] * world.size).shape,
    }


@pytest.mark.parametrize("size", [1, 3])
def test_collective(size: int) -> None:
    for rank, seen in enumerate(run_ranks(size, collectives)):
        assert seen["world"] == (rank, size, rank == 0, "cpu")
        assert seen["sum"] == [sum(range(size)), 2.0**53 - 1 + size - 1]
        assert seen["max"] == [size - 1, 2.0**53 - 1]
        assert seen["gather"] == [{"rank": r} for r in range(size)]
        assert seen["exchange"] == [[10 * r + rank] * 2 for r in range(1, size) for _ in range(rank + 1)]
        assert seen["nothing"] == (0,)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_collective_of_one(device: str) -> None:
    """In a process of its own; on CUDA rows go through NCCL, control values through gloo."""
    seen = run_alone(device.split(":")[0], collectives)
    assert seen["world"] == (0, 1, True, device)
    assert (seen["sum"], seen["max"], seen["gather"]) == ([0, 2.0**53 - 1], [0, 2.0**53 - 1], [{"rank": 0}])
    assert seen["exchange"] == [] and seen["nothing"] == (0,)


def reductions() -> list[bytes]:
    """Sums and maxima as bytes, amid other traffic of the same group."""
    world = start_world()
    rank, size, reduced = world.rank, world.size, []
    for values in contributions(size):
        own = values[rank].t()
        if size > 1:  # untagged, and not waited for until the end
            sent = dist.isend(torch.tensor([rank]), (rank + 1) % size)
        reduced += [world.collective.sum(own), world.collective.max(own)]
        assert world.collective.gather(rank) == list(range(size))
        if size > 1:
            came = torch.empty(1, dtype=torch.int64)
            dist.recv(came, (rank - 1) % size)
            sent.wait()
            assert came.item() == (rank - 1) % size
    return [pickle.dumps((values.dtype, values.tolist())) for values in reduced]


def contributions(size: int) -> list[torch.Tensor]:
    """[size, ...] per reduction: floats of very different sizes, so that the order of additions shows, and integers."""
    generator = torch.Generator().manual_seed(size)
    floats = torch.randn(size, 50, 7, dtype=torch.float64, generator=generator)
    floats *= 10.0 ** torch.randint(-9, 9, floats.shape, generator=generator)
    integers = torch.randint(-(2**52), 2**52, (size, 3, 40), generator=generator)
    return [floats, integers, floats[:, :0], floats[:, 0, 0], floats.float()]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_reductions_are_bit_equal_on_all_ranks_and_right(size: int) -> None:
    ranks = run_ranks(size, reductions)
    assert all(rank == ranks[0] for rank in ranks)
    results = iter(pickle.loads(reduced) for reduced in ranks[0])
    for values in contributions(size):
        (kind, total), (_, largest) = next(results), next(results)
        values = values.mT if values.dim() == 3 else values
        assert kind == values.dtype and largest == values.amax(0).tolist()
        if not values.is_floating_point():
            assert total == values.sum(0).tolist()
            continue
        flat = values.reshape(size, -1).T.tolist()
        scale = torch.tensor([math.fsum(map(abs, row)) for row in flat]).double()
        error = torch.tensor(total).double().flatten() - torch.tensor([math.fsum(row) for row in flat]).double()
        assert (error.abs() <= size * torch.finfo(kind).eps * scale).all()


def left_alone(how: str) -> Any:
    """Three ranks; the last leaves, or sleeps, before the second reduction."""
    timeout = timedelta(seconds=2 if how == "sleeps" else 60)
    rank = dist.get_rank()
    group = dist.new_group(backend="gloo", timeout=timeout)
    reduce_all(torch.ones(2), torch.add, group)
    if rank == 2:
        time.sleep(6 if how == "sleeps" else 0.2)
        return "left"
    start = time.perf_counter()
    try:
        reduce_all(torch.ones(2), torch.add, group)
    except RuntimeError as error:
        return time.perf_counter() - start, str(error)
    return None


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_rank_that_does_not_come_is_an_error_within_the_timeout(how: str) -> None:
    *others, last = run_ranks(3, left_alone, how)
    assert last == "left"
    for other in others:
        assert other is not None and other[0] < 5, other


def only_main() -> Any:
    collective = start_world().collective
    calls = []
    value = on_main(collective, lambda: calls.append(1) or {"from": collective.rank})
    try:
        on_main(collective, lambda: (_ for _ in ()).throw(ConfigError("run.name is taken. Give another.")))
    except ConfigError as error:
        return value, len(calls), str(error)
    return None


def test_rank_0_acts_and_its_error_is_everyones() -> None:
    assert run_ranks(2, only_main) == [({"from": 0}, calls, "run.name is taken. Give another.") for calls in (1, 0)]


def raised(action: Any) -> Any:
    try:
        return action()
    except KatdsError as error:
        return type(error).__name__, str(error), error.reported_by


def agreement(folder: Path) -> list[Any]:
    collective = start_world().collective
    rank = collective.rank

    def unlucky() -> int:
        if rank == 1:
            raise KeyError("weight")
        return rank

    (folder / f"seen-by-{rank}").touch()
    collective.barrier()
    return [
        raised(lambda: on_main(collective, lambda: (folder / "none" / "file").write_text(""))),
        raised(lambda: together(collective, unlucky, lambda error: ConfigError(f"broken: {error!r}"))),
        raised(lambda: together(collective, lambda: rank, lambda error: ConfigError("never"))),
        raised(lambda: same_everywhere(collective, {"data.train": 1, "stop.window": 4 + rank})),
        raised(lambda: same_everywhere(collective, {"data.train": 1})),
        raised(lambda: visible_everywhere(collective, folder / "seen-by-0", "run.folder")),
    ]


def test_ranks_act_as_one(tmp_path: Path) -> None:
    """An error on any rank is one error on all."""
    for rank, (unwritable, broken, fine, desync, agreed, visible) in enumerate(run_ranks(2, agreement, tmp_path)):
        assert unwritable[0] == "ConfigError" and str(tmp_path / "none" / "file") in unwritable[1]
        assert unwritable[2] == 0 and broken == ("ConfigError", "broken: KeyError('weight')", 1)
        assert fine == rank and agreed is visible is None
        assert (
            desync[0] == "DesyncError" and "stop.window is 4 on rank 0 but 5 on rank 1" in desync[1] and desync[2] == 0
        )


def test_a_file_that_a_rank_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katds.parallel.agree.VISIBLE_SECONDS", 0.3)

    def job(rank: LocalRank) -> Any:
        return raised(lambda: visible_everywhere(rank, tmp_path / ("none" if rank.rank == 1 else ""), "run.folder"))

    for kind, message, _ in run_local(2, job):
        assert kind == "ConfigError" and message.startswith("run.folder: rank 1 does not see")


def test_no_launcher_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from katds.parallel import world

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    world._default_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    port = os.environ["MASTER_PORT"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    world._default_environment()  # the launcher's word stands
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]) == ("1", "2", port)


# Its main thread keeps the interpreter's lock to the end, while gloo's workers ask for it to give their tensors back. On a
# busy machine, chance does the same to a real run.
LEAVES = """
import atexit, sys, time
import torch
import torch.distributed as dist
from katds.cli import run_main
from katds.errors import ConfigError

def main():
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
    sys.held = dist.group.WORLD  # as DeepSpeed's parameters do
    atexit.register(print, "atexit")
    print("main")
    sys.setswitchinterval(1000)
    dist.all_gather([torch.empty(2**23)], torch.ones(2**23), async_op=True)  # takes a while
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    LEAVE

run_main(main)
"""


def test_a_program_ends_with_its_own_code(tmp_path: Path) -> None:
    """Not with the -6 of a thread that asks for the interpreter's lock during the teardown; and nothing is lost."""
    leaves = {
        "return 0": (0, ""),
        "raise ConfigError('x')": (2, "error: x"),
        "raise KeyboardInterrupt": (130, ""),
        "1 // 0": (1, "ZeroDivisionError: "),
    }
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES.replace("LEAVE", leave), str(tmp_path / str(code))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for leave, (code, _) in leaves.items()
    ]  # fmt: skip
    for program, (code, said) in zip(programs, leaves.values(), strict=True):
        out, err = program.communicate(timeout=120)
        assert (program.returncode, out) == (code, "main\natexit\n"), err
        assert said in err and bool(said) == bool(err)


class Torn:
    """Ends the process where Python's teardown reaches it."""

    def __del__(self, abort: Callable[[], None] = os.abort) -> None:
        abort()


def cannot_be_torn_down(folder: Path) -> str:
    start_world()
    sys.held = Torn()  # type: ignore[attr-defined]
    atexit.register((folder / "atexit").touch)
    return "done"


def test_a_rank_of_a_measurement_ends_so_too(tmp_path: Path) -> None:
    assert run_alone("cpu", cannot_be_torn_down, tmp_path) == "done"
    assert (tmp_path / "atexit").exists()


def where_ninja_lies() -> str | None:
    os.environ["PATH"] = os.defpath
    start_world()
    return shutil.which("ninja")


def test_deepspeed_finds_ninja_where_the_environment_is_not_activated() -> None:
    """Or what it compiles for offload would fail on whoever has called .venv/bin/deepspeed."""
    assert run_ranks(1, where_ninja_lies)[0] is not None
