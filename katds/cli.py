"""Command line of all programs: a recipe file, dotted flags, help, and errors that a user can act on.

Order: defaults < recipe < flags. Relative paths in a recipe or flag start at the current directory; only `extends` is
relative to the recipe that says it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from pydantic import ValidationError

from katds.config import Recipe
from katds.errors import ConfigError, KatdsError
from katds.recipe_errors import explain
from katds.recipe_help import help_text
from katds.schema import default_kinds, leaves
from katds.settings import leaf_types
from katds.telling import tell, this_rank

LAUNCHER_FLAGS = ("local_rank", "local-rank")


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a date stays text, a key given twice or read as a truth value is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        for name in mapping:
            if not isinstance(name, str):
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is not text", problem_mark=node.start_mark)
        return mapping


class _Arguments(NamedTuple):
    config: Path | None
    flags: dict[str, Any]
    show: str  # "help", "print_config" or ""


def load_recipe(argv: Sequence[str], program: str, description: str) -> Recipe:
    """The recipe of a command line (without the program's name). Prints and exits 0 on --help and --print_config.

    Raises ConfigError: unknown flag or key, value out of range, unreadable file.
    """
    arguments = _parse(argv)
    if arguments.show == "help":
        _leave(help_text(program, description))
    layers = [default_kinds(Recipe), read_recipe(arguments.config) if arguments.config else {}, arguments.flags]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe)) from None
    if arguments.show == "print_config":
        _leave(dump_recipe(recipe))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads an equal recipe back."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)
    return text


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section. A section of another kind replaces the old one altogether."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if not isinstance(old, dict) or not isinstance(value, dict):
            merged[key] = value
        elif "kind" in value and "kind" in old and value["kind"] != old["kind"]:
            merged[key] = merge({}, value)
        else:
            merged[key] = merge(old, value)
    return merged


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a mapping, laid on the recipe that it extends."""
    if path.resolve() in below:
        chain = " -> ".join(str(p) for p in (*below, path.resolve()))
        raise ConfigError(f"extends goes round in a circle: {chain}. Remove one of these extends lines.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line} is not valid YAML: {error.problem}. Correct that line.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {_reason(error)}. Give an existing YAML file.") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"The recipe {path} holds a {type(content).__name__}. It must be a mapping of sections.")
    if (parent := content.pop("extends", None)) is None:
        return content
    if not isinstance(parent, str):
        raise ConfigError(f"extends in {path} is {parent!r}. It must be the path of one recipe.")
    return merge(read_recipe(path.parent / parent, (*below, path.resolve())), content)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script: a user error is one message and, on all ranks, its exit code, mostly 2, without a traceback."""
    try:
        code = main() or 0
    except KatdsError as error:
        tell(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    end_process(code)


def end_process(code: int) -> NoReturn:
    """What Python does at exit, up to but without the teardown of the interpreter.

    gloo's worker threads outlive `destroy_process_group`, since DeepSpeed's parameters hold the groups. A worker gives the
    tensors of its last collective back some time after the collective has returned, for which it needs the interpreter's
    lock; asked for during the teardown, the lock ends the thread and with it, through a C++ destructor, the process: exit
    code -6 after a finished run. Nothing tells when a worker has done so, so that waiting for it is no cure.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def _leave(text: str) -> NoReturn:
    if this_rank() == 0:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)
    sys.exit(0)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else "it is not UTF-8 text"


def _parse(argv: Sequence[str]) -> _Arguments:
    config: Path | None = None
    flags: dict[str, Any] = {}
    show = ""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-h", "--help", "--print_config"):
            show = show or ("print_config" if word == "--print_config" else "help")
            continue
        if not word.startswith("--") or not name:
            raise ConfigError(f"The argument {word!r} is not a flag. Write --SECTION.SETTING VALUE; see --help.")
        text = value if equals else rest.pop(0) if rest and not rest[0].startswith("--") else None
        if name in LAUNCHER_FLAGS:
            continue
        if name == "config":
            if not text:
                raise ConfigError("--config has no value. Give the path of a recipe.")
            config = Path(text)
        else:
            _put(flags, name, _value(name, text))
    return _Arguments(config, flags, show)


def _put(flags: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for depth, section in enumerate(sections):
        flags = flags.setdefault(section, {})
        if not isinstance(flags, dict):
            raise ConfigError(
                f"--{name} and --{'.'.join(sections[: depth + 1])} contradict each other. Give one of them."
            )
    flags[last] = value


def _value(name: str, text: str | None) -> Any:
    """Text stays as typed where the setting is text or a path; everything else is YAML."""
    types = set().union(*(leaf_types(leaf.info.annotation) for leaf in leaves(Recipe) if leaf.path == name))
    if text is None:
        if types and bool not in types:
            raise ConfigError(f"--{name} has no value. Write --{name} VALUE.")
        return True
    if types & {str, Path} and not (text == "null" and type(None) in types):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--{name} is {text!r}, which is not valid YAML. Quote it, or see --help.") from None
