"""The C code is compiled once, by whatever compiler there is, and whatever goes wrong is one clear reason."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katds.models.native import build

CC = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is compiled yet, in a home folder whose path needs quoting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a home's cache"))
    monkeypatch.delenv("CC", raising=False)
    build._library.cache_clear()
    yield
    build._library.cache_clear()


def compiled(tmp_path: Path) -> list[str]:
    """All that lies in the cache."""
    return sorted(str(path.relative_to(tmp_path / "a home's cache")) for path in tmp_path.glob("a home's cache/*/*"))


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return shlex.quote(str(path))


def reason() -> str:
    with pytest.raises(build.Unavailable) as raised:
        build.library()
    return str(raised.value)


def test_one_compilation_serves_later_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    fake = script(tmp_path / "my tools" / "cc", f'echo "$@" >> {log}\nexec {CC} "$@"')
    monkeypatch.setenv("CC", f"{fake} -DNOTHING=1 -w")  # a path with a space, and arguments
    first = build.library()
    assert isinstance(first, ctypes.CDLL) and build.library() is first
    (name,) = compiled(tmp_path)
    assert name.startswith("katds/native-") and "-DNOTHING=1" in log.read_text()
    build._library.cache_clear()
    assert build.library() is not first and log.read_text().count("forward.c") == 1
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    build._library.cache_clear()
    build.library()
    assert len(compiled(tmp_path)) == 2, "another build overwrote a library that may be in use"


def test_ranks_that_compile_at_once_leave_one_file(tmp_path: Path) -> None:
    code = "from katds.models.native.build import library; print(library().katds_forward is not None)"
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["True\n"] * 4
    assert len(compiled(tmp_path)) == 1


def test_a_home_that_cannot_be_written_costs_a_compilation_per_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    assert build.library().katds_forward


def test_a_broken_library_is_not_trusted_but_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'echo "$@" >> {log}\nexec {CC} "$@"'))
    process = [sys.executable, "-c", "from katds.models.native.build import library; assert library().katds_forward"]
    subprocess.run(process, check=True)
    (name,) = compiled(tmp_path)
    library = tmp_path / "a home's cache" / name
    library.write_bytes(b"not a library")
    for _ in range(2):
        subprocess.run(process, check=True)
    assert log.read_text().count("forward.c") == 2, "it was compiled for every process"


def test_a_published_library_is_not_replaced(tmp_path: Path) -> None:
    """Other nodes may have it mapped."""
    build.library()
    (name,) = compiled(tmp_path)
    library = tmp_path / "a home's cache" / name
    before = library.stat().st_ino
    build._publish(library, library)
    assert library.stat().st_ino == before


def test_code_in_a_temporary_folder_need_not_be_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    load = ctypes.CDLL

    def guarded(path: str, *more: Any) -> ctypes.CDLL:
        if path.startswith(tempfile.gettempdir()) and "a home's cache" not in path:
            raise OSError("failed to map segment from shared object")
        return load(path, *more)

    monkeypatch.setattr(ctypes, "CDLL", guarded)
    assert build.library().katds_forward


def test_unlike_machines_do_not_share_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {build._fingerprint([str(CC)])}
    cpuinfo = Path.read_text
    run = build._run
    for change in (
        lambda patch: patch.setattr("platform.machine", lambda: "riscv64"),
        lambda patch: patch.setattr(build, "_run", lambda c: subprocess.CompletedProcess(c, 0, "another version", "")),
        lambda patch: patch.setattr(Path, "read_text", lambda p: "flags: fpu\n" if p.name == "cpuinfo" else cpuinfo(p)),
        lambda patch: patch.setattr(build, "FLAGS", ["-O1"]),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            found.add(build._fingerprint([str(CC)]))
    assert len(found) == 5 and build._run is run


def test_a_compiler_without_march_native_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse = 'case "$*" in *march=native*) echo "error: unsupported argument" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'{refuse}\nexec {CC} "$@"'))
    assert build.library().katds_forward


def test_failures_are_one_reason_and_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = f'echo "$@" >> {log}\necho "note: wait" >&2\necho "fatal error: no disk" >&2\nexit 1'
    named = script(tmp_path / "cc", text)
    monkeypatch.setenv("CC", f"{named} -O1")
    assert reason() == reason() == f"{tmp_path / 'cc'} -O1 fails: fatal error: no disk"
    assert log.read_text().count("forward.c") == len(build.TARGETS)
    assert compiled(tmp_path) == []


@pytest.mark.parametrize(
    "cc, said",
    [
        ("no-such-compiler -m64", "there is no C compiler (no-such-compiler -m64)"),
        ("'unclosed", "CC is 'unclosed (No closing quotation)"),
    ],
)
def test_a_compiler_that_is_none(cc: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    assert reason() == said


def test_a_compiler_that_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path / "cc", "").strip()
    (tmp_path / "cc").write_bytes(b"\x00\x01")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert reason().startswith(f"{tmp_path / 'cc'} cannot be run (")
    script(tmp_path / "slow", "exec sleep 60")
    monkeypatch.setenv("CC", str(tmp_path / "slow"))
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.2)
    build._library.cache_clear()
    assert "timed out" in reason()


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "  ")
    assert reason() == "there is no C compiler (cc, gcc or clang)"


def test_a_compiler_that_writes_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "silent", "exit 0"))
    assert reason() == f"{tmp_path / 'silent'} fails: exit code 0"
    text = 'while [ "$1" != -o ]; do shift || exit 0; done; echo x > "$2"'
    monkeypatch.setenv("CC", script(tmp_path / "liar", text))
    build._library.cache_clear()
    assert reason().startswith("the compiled code cannot be written or loaded (")


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for a user id that has no entry: nothing is written to a folder named ~."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert build.library().katds_forward and not list(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build._folder() is None
