"""Compiles the C code with the machine's C compiler, once per source, compiler and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("forward.c", "attention.c")]
HEADER = Path(__file__).with_name("common.h")
# Of -ffast-math all that lets sums be vectorised; the whole of it would switch off denormal numbers for the entire process,
# and NaN. ISO C would forbid fused multiply-add.
FLAGS = [
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
]  # fmt: skip
TARGETS: list[list[str]] = [["-march=native"], []]  # clang does not know the first for every processor
COMPILE_SECONDS = 60  # a compiler may wait for a licence or a file server


class Unavailable(Exception):
    """The C code cannot be used, and why, as half a sentence."""


def library() -> ctypes.CDLL:
    """The compiled library; a second or two the first time on a machine. Raises Unavailable, on every call for one reason."""
    loaded = _library()
    if isinstance(loaded, str):
        raise Unavailable(loaded)
    return loaded


@cache
def functions() -> tuple[int, int, int]:
    """Addresses of the matrix product in the BLAS that PyTorch brings along, of its threads' GOMP_parallel, and of what says how many
    threads a product is cut up for; 0 for the last two where there is none."""
    if sys.byteorder != "little":  # see sgemm_fn of common.h
        raise Unavailable("the machine is big-endian")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        product = torch_cpu.sgemm_
    except (OSError, AttributeError):
        raise Unavailable("PyTorch's BLAS cannot be reached") from None
    others = (getattr(torch_cpu, name, None) for name in ("GOMP_parallel", "MKL_Set_Num_Threads_Local"))
    addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 if f else 0 for f in (product, *others)]
    return addresses[0], addresses[1], addresses[2]


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        compiler, folder = _compiler(), _folder()
        name = f"native-{_fingerprint(compiler)}.so"
        if folder is not None:
            with suppress(OSError):  # not there, or not loadable
                return ctypes.CDLL(str(folder / name))
        with tempfile.TemporaryDirectory() as temporary:
            built = Path(temporary) / name
            _compile(compiler, built)
            if folder is not None:
                with suppress(OSError):  # a home that cannot be written costs every process a compilation
                    _publish(built, folder / name)
                    return ctypes.CDLL(str(folder / name))  # code in a temporary folder may not be executable
            return ctypes.CDLL(str(built))  # stays mapped without its file
    except Unavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled code cannot be written or loaded ({error})"


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    try:
        candidates = [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise Unavailable(f"CC is {named} ({error})") from None
    for words in candidates:
        if shutil.which(words[0]):
            return words
    raise Unavailable(f"there is no C compiler ({named or 'cc, gcc or clang'})")


def _folder() -> Path | None:
    """Where the library is kept; None for a user without a home. The XDG specification ignores relative paths."""
    named, usual = Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache"))
    base = named if named.is_absolute() else usual
    return base / "katds" if base.is_absolute() else None


def _fingerprint(compiler: list[str]) -> str:
    """Names what the machine code depends on: a home folder may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    version = _run([*compiler, "--version"]).stdout
    sources = [path.read_text() for path in (*SOURCES, HEADER)]
    parts = [*sources, *compiler, *FLAGS, version, platform.machine(), processor]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    for target in TARGETS:
        done = _run([*compiler, *FLAGS, *target, "-o", str(path), *map(str, SOURCES), "-lm"])
        if done.returncode == 0 and path.exists():
            return
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    error = next((line for line in lines if "error" in line.lower()), lines[0])
    raise Unavailable(f"{shlex.join(compiler)} fails: {error.strip()}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
            timeout=COMPILE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run ({error})") from None


def _publish(built: Path, cached: Path) -> None:
    """Puts the library where later processes look for it.

    The first of many ranks wins. A link, not a replacement: on a network file system, replacing a library kills the
    processes on other nodes that have it mapped. One that cannot be loaded here is put aside, not removed, for the same reason.
    """
    cached.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        try:
            ctypes.CDLL(str(cached))
        except OSError:
            cached.rename(cached.with_suffix(".unloadable"))
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        whole = Path(folder) / cached.name
        shutil.copyfile(built, whole)
        with suppress(FileExistsError):
            os.link(whole, cached)
