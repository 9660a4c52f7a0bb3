"""The comparison file: which cells there are, over which seeds, and where they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from katds.cli import merge, read_recipe
from katds.errors import ConfigError
from katds.recipe_errors import explain
from katds.settings import Count, Positive, Section

Overrides = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Comparison(Section):
    """Cells (a recipe with some settings changed) x objectives x seeds: a training run each."""

    recipe: Path = Field(description="recipe that every cell starts from")
    folder: Path = Field(description="where the runs are written, CELL-seedSEED each; two comparisons may share it")
    report: Path | None = Field(None, description="where the outcome is written; default: folder")
    seeds: Annotated[list[Count], Field(min_length=1)] = Field([0, 1, 2], description="run.seed of each repetition")
    settings: Overrides = Field({}, description="laid on the recipe for every cell, nested or dotted")
    ranks: Positive = Field(2, description="processes of a run, all on this machine")
    cells: Annotated[dict[str, Overrides], Field(min_length=1)] = Field(
        description="name -> settings laid on the recipe, nested or dotted; `after: CELL` runs it behind that cell's run of the same "
        "seed, whose folder is then {after}; {seed} and {folder} may stand in any text"
    )
    reference: str | None = Field(None, description="cell that the others are compared with; default: the first")
    objectives: dict[str, Overrides] = Field(
        {},
        description="name -> settings; each cell is run with each of them, CELL.NAME. `cells: [CELL, ...]` among the settings runs these "
        "alone, once as they are and once more with them, unswept",
    )
    sweeps: dict[str, dict[str, list[Any]]] = Field({}, description="cell -> setting -> values that it also takes")

    @property
    def report_folder(self) -> Path:
        return self.report or self.folder


def load_comparison(path: Path) -> Comparison:
    """Raises ConfigError: unreadable file, unknown key, value out of range, a name that does not exist."""
    content = read_recipe(path)
    try:
        comparison = Comparison.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    _check(comparison)
    return comparison


def _explain(error: ValidationError) -> str:
    kinds = {finding["type"]: finding["loc"][0] for finding in error.errors()}
    if "missing" in kinds and "extra_forbidden" not in kinds:
        return f"{kinds['missing']} is missing. Add it; see --help."
    return explain(error, Comparison)


def _check(comparison: Comparison) -> None:
    if len(set(comparison.seeds)) < len(comparison.seeds):
        raise ConfigError(
            f"seeds is {comparison.seeds}, with one seed twice. Give each once: equal runs are no repetition."
        )
    for field in ("cells", "objectives"):
        for name in getattr(comparison, field):
            if not NAME.fullmatch(name):
                raise ConfigError(f"{field}: {name!r} names a folder. Use letters, digits and . _ - only.")
    if comparison.reference is not None:
        known_cell(comparison, "reference", comparison.reference)
    for name, settings in comparison.sweeps.items():
        known_cell(comparison, "sweeps", name)
        for setting, values in settings.items():
            if not values:
                raise ConfigError(f"sweeps.{name}: {setting} has no values. Give some, or remove the line.")


def known_cell(comparison: Comparison, field: str, name: str) -> None:
    if name not in comparison.cells:
        close = get_close_matches(name, comparison.cells, 1)
        remedy = f"Did you mean {close[0]}?" if close else f"The cells are {', '.join(comparison.cells)}."
        raise ConfigError(f"{field} is {name!r}, which is no cell. {remedy}")


def nested(overrides: Mapping[str, Any]) -> Overrides:
    """Dotted keys as sections: {"stop.window": 8} is {"stop": {"window": 8}}."""
    result: Overrides = {}
    for key, value in overrides.items():
        *sections, last = key.split(".")
        part: Overrides = {last: nested(value) if isinstance(value, dict) else value}
        for section in reversed(sections):
            part = {section: part}
        result = merge(result, part)
    return result


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """`value` with every {word} in its texts replaced. Other braces stay: a pattern may hold some."""
    if isinstance(value, dict):
        return {key: filled(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, words) for inner in value]
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace("{" + word + "}", text)
    return value
