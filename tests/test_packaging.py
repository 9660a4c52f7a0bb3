"""What `make` installs is pinned, and what pip and make are told agrees with the package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import katds

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[0-9]+(\.[0-9]+)*(b[0-9]+)?(\.post[0-9]+)?)")
NEEDS_A_COMPILER = {"flash-attn"}


def pins() -> dict[str, str]:
    return {canonicalize_name(m["name"]): m["version"] for m in map(PIN.fullmatch, CONSTRAINTS) if m}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in [PROJECT["dependencies"], *extras] for text in group]


def make(*arguments: str) -> str:
    """What make prints; without the flags and the job server of a make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_constraints_are_plain_pins_without_local_builds() -> None:
    odd = [line for line in CONSTRAINTS if not PIN.fullmatch(line)]
    assert not odd, f"not of the form name==version: {odd}"
    assert len(pins()) == len(CONSTRAINTS), "a package is pinned twice"
    bound_to_one_machine = [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton", "katds"))]
    assert not bound_to_one_machine


def test_every_dependency_and_extra_is_pinned_within_its_range() -> None:
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in NEEDS_A_COMPILER:
            continue
        assert name in pins(), f"{name} of pyproject.toml has no line in constraints.txt"
        assert requirement.specifier.contains(pins()[name]), f"{requirement} excludes the pinned {pins()[name]}"


def test_version_is_that_of_pyproject() -> None:
    assert katds.__version__ == PROJECT["version"]


def test_every_file_of_the_package_is_in_the_wheel(tmp_path: Path) -> None:
    """C code, which is compiled where it is used, comes along only because pyproject.toml says so."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "katds", tmp_path / "katds", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected, built = (
        {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
        for base in (tmp_path / "katds", tmp_path / "built" / "katds")
    )
    assert built == expected


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_shows_help_and_plans_every_target() -> None:
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"help", "venv", "test", "demo", "check", "format", "clean"} == set(targets)
    shown = make("help")
    assert make() == shown, "help is the default target"
    for target in targets:
        assert f"make {target} " in shown
        make("-n", target)
    assert "pytest" in make("-n", "test")
