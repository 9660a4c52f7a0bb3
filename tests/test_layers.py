"""Imports point only downwards (DESIGN section 2), and the training loop stays readable."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import from its own layer and from those named here, and nothing else of katds.
BELOW: dict[str, set[str]] = {
    "base": set(),  # errors.py, files.py, settings.py, signals.py
    "core": {"base"},
    "config": {"core", "base"},  # config.py, cli.py and what they consist of
    "models": {"config", "core", "base"},
    "data": {"config", "core", "base"},
    "rollout": {"models", "core", "base"},
    "parallel": {"models", "rollout", "config", "core", "base"},
    "evaluation": {"rollout", "data", "models", "config", "core", "base"},
    "analysis": {"evaluation", "parallel", "rollout", "data", "models", "config", "core", "base"},
    "train": {"evaluation", "parallel", "rollout", "data", "models", "config", "core", "base"},
}
BELOW["report"] = {"analysis", "config", "core", "base"}
BELOW["inputs"] = {"parallel", "data", "models", "config", "core", "base"}
BELOW["run"] = set(BELOW)
BELOW["plan"] = set(BELOW)
BELOW["bench"] = set(BELOW)
BELOW["compare"] = set(BELOW)
BELOW["launch"] = set(BELOW)
SINGLE = {"inputs": "inputs", "assemble": "run", "run": "run", "startup": "run", "evaluate": "run"}
SINGLE |= dict.fromkeys(("errors", "files", "settings", "signals"), "base")
CONFIG = {"config", "sections", "cli", "schema", "recipe_errors", "recipe_help", "telling"}
MODULES = sorted((ROOT / "katds").rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line), also of imports inside functions; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            for alias in node.names:
                inner = ROOT / (module + "." + alias.name).replace(".", "/")
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield (f"{module}.{alias.name}" if is_module else module), node.lineno


def layer(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    if len(parts) == 1:
        return "base"  # the version
    return "config" if parts[1] in CONFIG else SINGLE.get(parts[1], parts[1])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    mine = layer(name_of(path))
    assert mine in BELOW, f"{path} is in no layer of DESIGN section 2"
    for module, line in imports(path):
        if module.split(".")[0] in ("katds", "launch"):
            assert layer(module) in BELOW[mine] | {mine}, f"{path}:{line}: {mine} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_in_their_layers(path: Path) -> None:
    mine, name = layer(name_of(path)), name_of(path)
    for module, line in imports(path):
        top = module.split(".")[0]
        if top == "deepspeed" or module.startswith("torch.distributed"):
            assert mine == "parallel", f"{path}:{line}: only katds.parallel imports {module}"
        if mine == "core":
            solver = name == "katds.core.transport" and top == "ot"  # of one objective
            allowed = solver or top in {"katds", "torch", "pydantic"} or top in sys.stdlib_module_names
            assert allowed, f"{path}:{line}: core imports {module}"
        if mine == "rollout":
            assert top in {"katds", "torch"} or top in sys.stdlib_module_names, (
                f"{path}:{line}: rollout imports {module}"
            )
        if name in ("katds.rollout.slots", "katds.rollout.requests"):
            assert top != "torch", f"{path}:{line}: scheduling needs no tensors"


def test_torch_distributed_is_not_reached_by_attribute() -> None:
    for path in MODULES:
        if layer(name_of(path)) != "parallel":
            code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
            code = re.sub(r'"""(?s:.*?)"""', "", code)
            assert not re.search(r"torch\.distributed\.\w+\(|\bdist\.\w+\(", code), path


def test_kinds_become_objects_in_one_place() -> None:
    """Only katds.assemble reads `.kind` of a section; the recipe's own checks and messages may name it."""
    for path in MODULES:
        if layer(name_of(path)) not in {"run", "config"}:
            reads = [
                n.lineno
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Attribute) and n.attr == "kind"
            ]
            assert not reads, f"{path}:{reads}"


def test_training_loop_is_short_and_speaks_of_training() -> None:
    from katds.train.trainer import Trainer

    bodies = [textwrap.dedent(inspect.getsource(function)) for function in (Trainer.train, Trainer.step)]
    assert sum(len(body.splitlines()) for body in bodies) <= 40
    for word in ("deepspeed", "rank", "kind", "zero", "gather"):
        assert not re.search(word, "".join(bodies), re.IGNORECASE), word


def test_every_module_says_what_it_is_for() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
