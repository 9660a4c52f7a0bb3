"""Where shards and optimizer states lie, in device memory, on the host or on NVMe, changes nothing that is computed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import operators
import pytest
import torch
from ranks import run_ranks
from test_hpz import bits, same
from test_view import VOCABULARY, learn, packed
from zoo import build_model, build_recipe, deepspeed_json, optimizer

from katds import run
from katds.config import Recipe
from katds.core.collective import Solo
from katds.errors import ConfigError
from katds.inputs import read_inputs
from katds.parallel.deepspeed_config import read_deepspeed_json
from katds.parallel.offload import LentFolder, check_offload, in_own_folder, remove_files
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen, load_student

LARGE = {"hidden": 512, "layers": 2, "head_dim": 64}  # shards below 1 MiB stay on the host


def config(run: str = "", **devices: str) -> dict[str, Any]:
    """`devices`: optimizer or param -> cpu or nvme, below the folder `run`. DeepSpeed's own buffers would be 2 GB for each model."""
    settings = deepspeed_json()
    for block, device in devices.items():
        settings["zero_optimization"][f"offload_{block}"] = {"device": device, "pin_memory": False}
        if device == "nvme":
            settings["zero_optimization"][f"offload_{block}"]["nvme_path"] = run
            if block == "param":
                settings["zero_optimization"]["offload_param"]["buffer_size"] = 600_000
    return settings


def updated(path: Path, settings: dict[str, Any]) -> list[Any]:
    start_world()
    student = load_student(path, settings, VOCABULARY, optimizer(), checkpointing=False)
    seen = [bits(student)]
    for _ in range(2):
        learn(student)
        seen.append(bits(student))
    return seen


def close(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Of two implementations of Adam in float32: to a thousandth of an update, which is as large as its rate, 1e-2."""
    return one.keys() == two.keys() and all(abs(one[name] - two[name]).max() < 1e-5 for name in one)


@pytest.mark.slow
def test_an_optimizer_on_the_host_updates_alike(tmp_path: Path) -> None:
    """DeepSpeed's Adam for the CPU against PyTorch's, with the parameters offloaded as well, or not."""
    operators.need("CPUAdamBuilder")
    path = build_model(tmp_path / "student", seed=1, tied=True, vocabulary=72)
    plain, alone, both = (
        run_ranks(2, updated, path, config(**devices))
        for devices in ({}, {"optimizer": "cpu"}, {"optimizer": "cpu", "param": "cpu"})
    )
    for expected, one, two in zip(plain, alone, both, strict=True):
        assert all(map(close, one, expected)) and all(map(same, two, one)) and not close(one[0], one[1])


def equal_to_the_host(tmp_path: Path, **devices: str) -> None:
    operators.need("CPUAdamBuilder", "AsyncIOBuilder")
    path = build_model(tmp_path / "student", seed=1, tied=True, vocabulary=72, **LARGE)
    host = run_ranks(2, updated, path, config(optimizer="cpu"))
    disk = run_ranks(2, updated, path, config(str(tmp_path / "nvme"), **devices))
    assert list((tmp_path / "nvme").rglob("*.swp"))
    for seen, expected in zip(disk, host, strict=True):
        assert all(map(same, seen, expected))


@pytest.mark.slow
def test_parameters_on_nvme_are_updated_the_same(tmp_path: Path) -> None:
    """Bit for bit, two updates long, by an optimizer on the host."""
    equal_to_the_host(tmp_path, optimizer="cpu", param="nvme")


@pytest.mark.slow
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="why katds refuses it")
def test_an_optimizer_on_nvme_updates_the_same(tmp_path: Path) -> None:
    equal_to_the_host(tmp_path, optimizer="nvme")


def scored(path: Path, settings: dict[str, Any], block: int) -> list[Any]:
    """The logits of two teachers with the same JSON, beside each other, however they are gathered."""
    world = start_world()
    logits = []
    for gather in ("layer", "phase"):
        teachers = [
            load_frozen(path, in_own_folder(settings, "run", role), VOCABULARY, gather, world.block(block).group)
            for role in ("teacher", "teachers.other")
        ]
        for _ in range(3):
            for teacher in teachers:
                with teacher.reading() as model, torch.no_grad():
                    logits.append(model(**packed()).numpy())
        with teachers[0].head_weight() as (head, _):
            logits.append(head.detach().numpy().copy())
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("block", [2, 1])
def test_a_teacher_on_nvme_reads_the_same(tmp_path: Path, block: int) -> None:
    """Bit for bit, also in blocks of one rank; its files lie in a folder of its own, and are removed."""
    operators.need("AsyncIOBuilder")
    path, disk = build_model(tmp_path / "teacher", seed=5, vocabulary=72, **LARGE), tmp_path / "nvme"
    plain, nvme = (
        run_ranks(2, scored, path, settings, block) for settings in (config(), config(str(disk), param="nvme"))
    )
    for expected, seen in zip(plain, nvme, strict=True):
        assert all((one == two).all() for one, two in zip(expected, seen, strict=True))
    for role in ("teacher", "teachers.other"):
        assert list((disk / "run" / role).rglob("*.swp"))
        remove_files(config(str(disk), param="nvme"), "run", role)
    assert not list(disk.iterdir())


def test_a_folder_of_its_own() -> None:
    given = config("/fast", optimizer="nvme", param="nvme")
    for role in ("student", "teachers.math"):
        zero = in_own_folder(given, "kat", role)["zero_optimization"]
        assert {zero[block]["nvme_path"] for block in ("offload_optimizer", "offload_param")} == {f"/fast/kat/{role}"}
    assert given == config("/fast", optimizer="nvme", param="nvme"), "the user's JSON was changed"
    assert in_own_folder(config(param="cpu"), "kat", "teacher") == config(param="cpu")


def lend(disk: Path, name: str, then: str) -> None:
    """A program that reads a model from its folder on NVMe, until there is a file `then`; killed where it is "kill"."""
    lent = LentFolder(config(str(disk), param="nvme"), "run", "evaluated", Solo())
    own = Path(lent.config["zero_optimization"]["offload_param"]["nvme_path"])
    assert own.parent == disk / "run"
    own.mkdir()
    (own / f"{name}.swp").touch()
    while not (disk / then).exists():
        time.sleep(0.01)
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    assert [file.name for file in own.iterdir()] == [f"{name}.swp"], "another program was in there"
    lent.remove()


def test_two_programs_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    """Or DeepSpeed would empty that of the first when the second begins; and what a killed one leaves goes with the next."""
    context = multiprocessing.get_context("fork")
    start = [context.Process(target=lend, args=(tmp_path, n, then)) for n, then in (("one", "end"), ("two", "kill"))]
    for program in start:
        program.start()
    while len(list(tmp_path.rglob("*.swp"))) < 2:
        time.sleep(0.01)
        assert not any(program.exitcode for program in start)
    (tmp_path / "kill").touch()
    start[1].join()
    third = context.Process(target=lend, args=(tmp_path, "three", "end"))
    third.start()
    while sorted(file.name for file in tmp_path.rglob("*.swp")) != ["one.swp", "three.swp"]:
        time.sleep(0.01)
        assert third.is_alive()
    (tmp_path / "end").touch()
    for program in (start[0], third):
        program.join()
    assert [start[0].exitcode, third.exitcode] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"end", "kill"}


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_offload(config(optimizer="none", param="none"), "student")
    check_offload(config(param="cpu"), "teacher")
    with pytest.raises(
        ConfigError, match=r"student\.deepspeed: offload_optimizer\.device is 'disk'; set it to one of none, cpu, nvme"
    ):
        check_offload(config(optimizer="disk"), "student")
    with pytest.raises(ConfigError, match=r"student\.deepspeed: offload_optimizer\.device is nvme, .* Set it to cpu"):
        check_offload(config(str(tmp_path), optimizer="nvme"), "student")
    with pytest.raises(ConfigError, match=r"teacher\.deepspeed: offload_param\.nvme_path is ''; name a folder"):
        check_offload(config(param="nvme"), "teacher")
    with pytest.raises(
        ConfigError, match=r"nvme_path .*/below cannot be written to \(not a directory\); name a folder"
    ):
        check_offload(config(str(tmp_path / "file" / "below"), param="nvme"), "teacher")
    monkeypatch.setenv("LDFLAGS", "-nodefaultlibs")  # the linker finds nothing
    with pytest.raises(
        ConfigError, match=r"offload_param\.device is nvme, which needs libaio .* \(apt-get install libaio-dev"
    ):
        check_offload(config(str(tmp_path), param="nvme"), "teacher")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"offload_optimizer\.device is cpu, for which DeepSpeed compiles code, .* install g\+\+"
    ):
        check_offload(config(optimizer="cpu"), "student")


def test_it_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, "offload")
    recipe["teacher"]["deepspeed"] = str(tmp_path / "nvme.json")
    (tmp_path / "nvme.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/proc/katds"}}}'
    )
    assert read_inputs(Recipe.model_validate(recipe)).teacher_jsons
    with pytest.raises(
        AssertionError,
        match=r"ConfigError: teacher\.deepspeed: offload_param\.nvme_path /proc/katds cannot be written to",
    ):
        run_ranks(1, run.train, Recipe.model_validate(recipe))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["zero3_bf16_hpz", "zero3_bf16_cpu_offload", "zero3_bf16_nvme_offload"])
def test_files_that_are_shipped(name: str) -> None:
    """They are read, and DeepSpeed knows every key of theirs."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = read_deepspeed_json(Path(f"ds_configs/{name}.json"), "student.deepspeed")
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert zero.stage == 3 and set(settings) == {"bf16", "zero_optimization"}
