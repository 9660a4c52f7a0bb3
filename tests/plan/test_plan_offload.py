"""What offload moves between device and host, against the copies that DeepSpeed's engines really ask for; and where its buffers lie."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from ranks import run_ranks
from test_plan_memory import changed, item, job_of
from test_plan_zero import _packed as packed
from test_plan_zero import learning_loss, shape_of
from torch.overrides import TorchFunctionMode
from zoo import build_model, optimizer

from katds.config import Recipe
from katds.parallel import zero as engines
from katds.parallel.world import start_world
from katds.plan import offload, volume
from katds.plan.advise import shortfalls
from katds.plan.hardware import GIB, GPUS, find
from katds.plan.items import ALWAYS, LEARN, ROLLOUT
from katds.plan.job import Job
from katds.plan.memory import memory
from katds.plan.rounds import fetched
from katds.plan.simulate import simulate
from katds.plan.zero import ZeroSettings, gathers, shard, sub_groups

STEADY = 3
WAYS = {
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "both": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "parameters": {"offload_param": {"device": "cpu"}},
}


def config(way: str, **more: Any) -> dict[str, Any]:
    """Any Adam will do: what counts is what goes to it."""
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 40,
        "stage3_prefetch_bucket_size": 3000,
    }
    return {"zero_optimization": zero | WAYS[way] | more, "zero_force_ds_cpu_optimizer": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), seed=1, layers=3, tied=True)


def with_zero(recipe: Recipe, folder: Path, **zero: Any) -> Recipe:
    path = folder / "offload.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3} | zero}))
    return changed(recipe, student={"deepspeed": str(path)})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_what_an_engine_copies(small: Recipe, tmp_path: Path, folder: Path, way: str, ranks: int) -> None:
    """A rollout phase, three micro-batches and an update, to the byte."""
    found = run_ranks(ranks, _copies, folder, config(way))[0]
    shape, zero = shape_of(folder), ZeroSettings.of(config(way))
    base = job_of(with_zero(small, tmp_path, **config(way)["zero_optimization"]), ranks, device="cuda")
    job = Job(**{**vars_of(base), "student": shape, "zero": zero})
    passed = gathers(shape.update_order, zero, ranks)

    def fetched(sizes: Any) -> int:
        return offload.fetched(volume.spread(sizes, 4, ranks), zero, shape.sizes, ranks).to_device

    small_ones = [size for size in shape.sizes if size <= 40]
    large = [size for size in shape.sizes if size > 40]
    per_batch, at_last, back = (offload.gradients(job, False), offload.gradients(job, True), offload.weights(job))
    expected = {
        ("view", "to device"): fetched(large),
        ("first", "to device"): fetched([*passed.sizes, *small_ones]) + per_batch.to_device,
        ("first", "to host"): per_batch.to_host,
        ("second", "to device"): fetched(passed.sizes) + per_batch.to_device,
        ("second", "to host"): per_batch.to_host,
        ("last", "to device"): fetched(passed.sizes) + at_last.to_device,
        ("last", "to host"): at_last.to_host,
        ("update", "to device"): back.to_device + fetched(small_ones),
    }
    told = {key: found[key] for key in expected}
    print(f"{way}, {ranks} ranks, bytes of a rank:", {" ".join(key): size for key, size in told.items() if size})
    if way == "parameters":  # an optimizer on the device reads its gradients there, and writes the weights to the host
        expected["update", "to device"] = fetched(small_ones)
        expected["update", "to host"] = back.to_host
        told["update", "to host"] = found["update", "to host"]
    assert told == expected
    assert sum(told.values()) > 0


def vars_of(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__dataclass_fields__}


def _copies(folder: Path, settings: dict[str, Any]) -> Counter[tuple[str, str]]:
    start_world()
    engines._adamw = lambda model, *_: torch.optim.AdamW(model.parameters())  # type: ignore[assignment]
    student = engines.load_student(folder, settings, 65, optimizer(), checkpointing=False)
    seen: Counter[tuple[str, str]] = Counter()
    with Copies(on_host(student.engine, settings["zero_optimization"])) as copies:
        for _ in range(STEADY):
            seen.clear()
            with student.decoding():
                copies.note(seen, "view")
            for name in ("first", "second", "last"):
                student.backward(learning_loss(student), last=name == "last")
                copies.note(seen, name)
            student.step(1e-3)
            copies.note(seen, "update")
    return seen


def on_host(engine: Any, zero: dict[str, Any]) -> list[torch.Tensor]:
    """What lies on the host where there is a device beside it."""
    found = []
    if "offload_param" in zero:
        found += [parameter.ds_tensor for parameter in engine.module.parameters()]
    if "offload_optimizer" in zero:
        groups = engine.optimizer.fp32_partitioned_groups_flat
        found += [engine.optimizer.grad_partitions_flat_buffer, *groups, *(group.grad for group in groups)]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_teacher_copies(small: Recipe, tmp_path: Path, folder: Path, ranks: int) -> None:
    """Its head for a loss over the whole vocabulary, its embedding for topd, a round's layers, and all of it for a phase: to the byte."""
    found = run_ranks(ranks, _teacher_copies, folder, config("parameters"))[0]
    away = with_zero(small, tmp_path, **config("parameters")["zero_optimization"])
    for gather in ("layer", "phase"):
        sections = {"teacher": {"gather": gather, "deepspeed": str(tmp_path / "offload.json")}}
        job = job_of(
            changed(away, objective={"kind": "reverse_kl", "support": "full"}, **sections), ranks, device="cuda"
        )
        zero = ZeroSettings.of(config("parameters"), optimizer=False)
        teacher = replace(job.teachers[0], shape=shape_of(folder), zero=zero)
        job = replace(job, teachers=(teacher,))
        head = fetched(job, teacher, volume.teacher_head(job))
        assert found["head"] == head.to_device > 0
        assert found["embedding"] == fetched(job, teacher, volume.teacher_embedding(job)).to_device > 0
        assert found[gather] == fetched(job, teacher, getattr(volume, PHASES[gather])(job, teacher)).to_device > 0
        step = simulate(job, GPUS["h100"], *job.drawn)
        assert step.links["learn: teacher's head"] == head
    kept = changed(away, objective={"kind": "reverse_kl", "support": "full"}, teacher={"gather": "once"})
    job = job_of(kept, ranks, device="cuda")
    assert "learn: teacher's head" not in simulate(job, GPUS["h100"], *job.drawn).links


PHASES = {"layer": "teacher_forward", "phase": "teacher_phase"}


def _teacher_copies(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    start_world()
    found: dict[str, int] = {}
    for gather in PHASES:
        frozen = engines.load_frozen(folder, settings, 65, gather)
        shards = on_host(frozen.engine, settings["zero_optimization"])
        with Copies(shards) as copies:
            for _ in range(STEADY):
                with frozen.reading() as model, torch.no_grad():
                    if gather == "layer":
                        model(**packed())
                    found[gather] = copies.taken()
                with frozen.head_weight():
                    found["head"] = copies.taken()
                with frozen.embedding_weight():
                    found["embedding"] = copies.taken()
    return found


class Copies(TorchFunctionMode):
    """Bytes of `Tensor.to` and `copy_` between the host's tensors and all others, on a machine where they lie in one memory.

    What comes from the host is made a copy, as it is where the device has a memory of its own.
    """

    def __init__(self, host: list[torch.Tensor]) -> None:
        super().__init__()
        self._host = {tensor.untyped_storage().data_ptr() for tensor in host}
        self.bytes: Counter[str] = Counter()
        get_accelerator().on_accelerator = lambda tensor: not self._here(tensor)

    def _here(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self._host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.to and self._here(args[0]):
            asked = [*args[1:], *kwargs.values()]
            if any(isinstance(value, str | torch.device) for value in asked):
                self.bytes["to device"] += args[0].nbytes
                return function(*args, **kwargs).clone()
        if function is torch.Tensor.copy_:
            target, source = args[:2]
            if self._here(target) and not self._here(source):
                self.bytes["to host"] += source.nbytes
            elif self._here(source) and not self._here(target):
                self.bytes["to device"] += target.nbytes
        return function(*args, **kwargs)

    def taken(self) -> int:
        """To the device, since the last time; of a model that only reads nothing goes back."""
        assert not self.bytes["to host"]
        return self.bytes.pop("to device", 0)

    def note(self, seen: Counter[tuple[str, str]], name: str) -> None:
        for way, size in self.bytes.items():
            seen[name, way] += size
        self.bytes.clear()


LOCKED = {  # by the student; the buffers, and what page-locking takes beyond them
    "offload_optimizer": ("gradients", "gradients for the optimizer", "gradients, page-locked"),
    "offload_param": ("shard", "shard, page-locked"),
}


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_page_locked(small: Recipe, tmp_path: Path, folder: Path, way: str, pinned: bool) -> None:
    """What engines ask the accelerator to lock and go on holding, each buffer rounded up as PyTorch does it: to a power of two
    (ATen/core/CachingHostAllocator.h). Only a GPU's accelerator locks anything; the buffers are DeepSpeed's own."""
    ranks, settings = 2, config(way, sub_group_size=3000)
    zero = settings["zero_optimization"]
    for block in WAYS[way]:
        zero[block] = zero[block] | {"pin_memory": pinned}
    student, teacher = run_ranks(ranks, _locked, folder, settings)[0]
    recipe = with_zero(small, tmp_path, **zero)
    recipe = changed(recipe, teacher={"deepspeed": str(tmp_path / "offload.json")})
    job = replace(job_of(recipe, ranks, device="cuda"), student=shape_of(folder), zero=ZeroSettings.of(settings))
    frozen = ZeroSettings.of(settings, optimizer=False)
    job = replace(job, teachers=(replace(job.teachers[0], shape=shape_of(folder), zero=frozen),))
    planned = {i.name: i.bytes for i in memory(job).items if i.place == "cpu"}
    # Of a student's parameters DeepSpeed locks the buffer in any case.
    held = [name for block in WAYS[way] if pinned or block == "offload_param" for name in LOCKED[block]]
    assert sum(map(rounded, student)) == sum(planned[f"student: {name}"] for name in held)
    shards = [f"teacher: {name}" for name in LOCKED["offload_param"]] if pinned and "offload_param" in zero else []
    assert sum(map(rounded, teacher)) == sum(planned[name] for name in shards)
    assert sum("page-locked" in name for name in planned) == sum("page-locked" in name for name in [*held, *shards])
    if "offload_optimizer" in zero and pinned:
        groups = sorted(4 * size for size in sub_groups(job.student.sizes, ranks, 3000))
        assert len(groups) > 2 and set(groups) <= set(student)


def rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _locked(folder: Path, settings: dict[str, Any]) -> list[list[int]]:
    """Bytes of the buffers that a student and a teacher hold, of those that were to be locked."""
    start_world()
    engines._adamw = lambda model, *_: torch.optim.AdamW(model.parameters())  # type: ignore[assignment]
    seen: list[weakref.ref[torch.UntypedStorage]] = []

    def lock(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        locked = tensor.clone()  # as a page-locked one is
        seen.append(weakref.ref(locked.untyped_storage()))
        return locked

    get_accelerator().pin_memory = lock
    found, kept = [], []  # the engines live
    for load in (_updated, lambda *given: engines.load_frozen(*given, 65)):
        kept.append(load(folder, settings))
        found.append([storage.nbytes() for each in seen if (storage := each()) is not None])
        seen.clear()
    return found


def _updated(folder: Path, settings: dict[str, Any]) -> Any:
    student = engines.load_student(folder, settings, 65, optimizer(), checkpointing=False)
    student.backward(learning_loss(student), last=True)
    student.step(1e-3)
    return student


def test_what_is_offloaded_leaves_the_device(small: Recipe, tmp_path: Path) -> None:
    away = with_zero(small, tmp_path, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    plain, other = (memory(job_of(recipe, device="cuda")) for recipe in (small, away))
    place = {i.name: i.place for i in other.items}
    assert {place[f"student: {name}"] for name in ("AdamW moments", "fp32 weights", "gradients", "shard")} == {"cpu"}
    assert other.peak(ROLLOUT)[0] < plain.peak(ROLLOUT)[0] and other.peak(LEARN, "cpu")[0] > 0
    # A node has its ranks' buffers, and one checkpoint is read at a time.
    read = item(other, "checkpoint being read")
    one, four = (other.peak(("load",), "cpu", ranks)[0] for ranks in (1, 4))
    assert four - read == 4 * (one - read) > 0


def test_parameters_on_nvme_stay_on_the_host_as_far_as_they_may(small: Recipe, tmp_path: Path) -> None:
    """DeepSpeed's max_in_cpu is a billion elements: of a student that is all."""
    nvme = {"device": "nvme", "nvme_path": "/x", "buffer_size": 1000}
    places = []
    for limit in ({}, {"max_in_cpu": 100}):
        recipe = with_zero(small, tmp_path, offload_optimizer={"device": "cpu"}, offload_param=nvme | limit)
        job = job_of(recipe, device="cuda")
        found = memory(job)
        assert item(found, "student: buffers of NVMe") == 5 * 1000 * 2
        places.append(
            {i.place: i.bytes for i in found.items if i.name.startswith("student: shard") and "locked" not in i.name}
        )
        assert bool(simulate(job, GPUS["h100"], *job.drawn).links["learn: student's weights"].from_disk) == bool(limit)
    whole = places[0]["cpu"]
    assert places[0] == {"cpu": whole} and places[1] == {"cpu": 200, "nvme": whole - 200}


def test_one_rank_needs_room_for_what_it_fetches(small: Recipe, tmp_path: Path) -> None:
    """Without offload its shard is the whole model already."""
    plain = memory(job_of(small, 1, device="cuda"))
    recipe = with_zero(small, tmp_path, offload_param={"device": "cpu"}, stage3_param_persistence_threshold=40)
    job = job_of(recipe, 1, device="cuda")
    away = memory(job)
    names = [{i.name for i in found.items if i.place == "device"} for found in (plain, away)]
    assert "student: gathered view" not in names[0] and "student: shard" in names[0]
    assert {"student: gathered view", "student: gathered layers"} <= names[1] and "student: shard" not in names[1]
    view = item(away, "student: gathered view") + item(away, "student: small weights")
    assert view == sum(job.student.sizes) * 2


def test_a_host_that_is_too_small_is_told(small: Recipe, tmp_path: Path) -> None:
    recipe = with_zero(small, tmp_path, offload_optimizer={"device": "cpu"})
    job = job_of(recipe, 2, device="cuda")
    found = memory(job)
    needed = found.peak(ALWAYS, "cpu", 2)[0]
    fits, short = (find("h100", None, None, size) for size in (needed, needed - 1))
    assert shortfalls(job, found, fits) == [] == shortfalls(job, found, find("h100", None, None))
    (line,) = shortfalls(job, found, short)
    assert "host" in line and "2 ranks" in line and "more nodes" in line
    assert find("h100", None, None, 3 * GIB).host_memory == 3 * GIB


def test_an_update_on_the_host_by_hand(small: Recipe, tmp_path: Path) -> None:
    """Two ranks of a node share its memory; each has its own link."""
    job = job_of(with_zero(small, tmp_path, offload_optimizer={"device": "cpu"}), 2, device="cuda")
    profile = find("h100", None, None)
    own = shard(job.student.sizes, 2)
    step = simulate(job, profile, *job.drawn)
    one = 2 * own * (4 + 24 + 2) / profile.host_bandwidth + 2 * own / profile.host_link
    assert step.seconds["optimizer"] == pytest.approx(job.recipe.train.minibatches * one)
    count = job.recipe.train.minibatches
    assert step.links["learn: weights after an update"].to_device == count * 2 * own
    assert step.links["learn: gradients"].to_host == (step.micro_batches + count) * 4 * own
