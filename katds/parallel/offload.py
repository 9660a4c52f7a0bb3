"""What DeepSpeed's offload asks of a machine, checked before models are loaded; and where its files on NVMe lie.

DeepSpeed compiles what it needs when it needs it, in the middle of loading, and ends with the compiler's words if it cannot.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from katds.core.collective import Collective
from katds.errors import ConfigError, first_sentence

_BLOCKS = ("offload_optimizer", "offload_param")
_DEVICES = ("none", "cpu", "nvme")


def offload_device(config: Mapping[str, Any], block: str) -> str:
    """ "none", "cpu" or "nvme": where a DeepSpeed JSON puts the optimizer (`block` offload_optimizer) or the parameters (offload_param)."""
    found = config["zero_optimization"].get(block) or {}
    return str(found.get("device", "none"))


def check_offload(config: Mapping[str, Any], section: str) -> None:
    """Raises ConfigError where this machine cannot offload a model as its JSON says. Cost: some 0.1 s for NVMe, else nothing.

    Args:
        section: of the recipe that names the JSON.
    """
    for block in _BLOCKS:
        device, where = offload_device(config, block), f"{section}.deepspeed: {block}.device"
        if device not in _DEVICES:
            raise ConfigError(f"{where} is {device!r}; set it to one of {', '.join(_DEVICES)}.")
        if device == "nvme" and block == "offload_optimizer":
            raise ConfigError(
                f"{where} is nvme, where DeepSpeed updates weights wrongly (tests/parallel/test_offload.py), and does not restore "
                "its state. Set it to cpu; parameters may lie on NVMe (offload_param)."
            )
        if device == "nvme":
            _check_nvme(config["zero_optimization"][block].get("nvme_path"), f"{section}.deepspeed: {block}")
        if device == "nvme" or (device == "cpu" and block == "offload_optimizer"):
            _check_compiler(f"{where} is {device}")


def uncheckable(error: Exception) -> ConfigError:
    """For what a check of one rank raises besides its own messages."""
    return ConfigError(
        f"what a model needs of ranks and machine cannot be checked ({type(error).__name__}: {first_sentence(error)})."
    )


def in_own_folder(config: Mapping[str, Any], run: str, role: str) -> dict[str, Any]:
    """The JSON with nvme_path/RUN/ROLE for each nvme_path: DeepSpeed empties its folder there for each model that it begins to read, also
    that of another model, or of another run on this machine."""
    zero = dict(config["zero_optimization"])
    for block in _BLOCKS:
        if offload_device(config, block) == "nvme":
            zero[block] = {**zero[block], "nvme_path": str(Path(zero[block]["nvme_path"]) / run / role)}
    return {**config, "zero_optimization": zero}


def remove_files(config: Mapping[str, Any], run: str, role: str) -> None:
    """Removes what a run has left of a model on this node's NVMe. `config`: the user's, not that of `in_own_folder`."""
    for block in _BLOCKS:
        if offload_device(config, block) == "nvme":
            folder = Path(config["zero_optimization"][block]["nvme_path"]) / run
            shutil.rmtree(folder / role, ignore_errors=True)
            with suppress(OSError):  # another model's files are there, or another rank was faster
                folder.rmdir()


class LentFolder:
    """Collective: `in_own_folder` for a model that several programs of one run.name may read on one machine: each has its own
    nvme_path/RUN/ROLE-NUMBER. What a killed one has left there is removed by the next.

    Attributes:
        config: the JSON with that nvme_path.
    """

    def __init__(self, config: Mapping[str, Any], run: str, role: str, collective: Collective) -> None:
        self._collective, self._places, self._held = collective, list[Path](), list[TextIO]()
        name = f"{role}-{collective.gather(uuid.uuid4().hex)[0]}"
        for block in _BLOCKS:
            if offload_device(config, block) == "nvme":
                folder = Path(config["zero_optimization"][block]["nvme_path"]) / run
                folder.mkdir(parents=True, exist_ok=True)
                self._held.append(_hold(folder / f"{name}.lock"))
                self._places.append(folder / name)
                _sweep(folder, role)
        self.config = in_own_folder(config, run, name)

    def remove(self) -> None:
        """Collective: nobody reads there any more."""
        self._collective.barrier()  # or a rank would miss its files
        for place in self._places:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # another rank was faster, or another program is there
                place.with_name(f"{place.name}.lock").unlink()
                place.parent.rmdir()
        for lock in self._held:
            lock.close()


def _hold(lock: Path) -> TextIO:
    """The file, locked together with this program's other ranks, until it is closed or the process ends."""
    while True:
        held = lock.open("a")
        fcntl.flock(held, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(held.fileno())):
                return held
        held.close()  # another program has removed it before it was locked


def _sweep(folder: Path, role: str) -> None:
    """Removes what nobody holds."""
    for lock in folder.glob(f"{role}-*.lock"):
        with suppress(OSError), lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def _check_nvme(path: Any, where: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not path or not isinstance(path, str):
        raise ConfigError(f"{where}.nvme_path is {path!r}; name a folder on each node's own disk.")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        reason = str(error.strerror).lower()
        raise ConfigError(
            f"{where}.nvme_path {path} cannot be written to ({reason}); name a folder on each node's own disk."
        ) from None
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"{where}.device is nvme, which needs libaio and its header on every node, and here it is missing; install it (apt-get install "
            "libaio-dev, dnf install libaio-devel), or set device to cpu."
        )


def _check_compiler(where: str) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"{where}, for which DeepSpeed compiles code, but there is no C++ compiler {compiler}; install g++, or set device to none."
        )
