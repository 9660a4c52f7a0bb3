"""A comparison's cells, and the training run of each cell and seed.

Invariants:
- All cells learn from the same prompts: steps x prompts x samples, data and problems are equal.
- A run comes after the run that it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from katds.cli import merge, read_recipe
from katds.compare.plan import Comparison, Overrides, filled, known_cell, nested
from katds.config import Recipe
from katds.errors import ConfigError
from katds.recipe_errors import explain
from katds.schema import default_kinds, flat

# What must not differ between cells, besides the number of rollouts.
SHARED = ("student", "data", "evaluation")


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Args:
        after: cell whose run is needed first.
        against: cell that this one is compared with; itself where it is the one that others are compared with.
        swept: the setting and the value that make it a variant of `against`.
    """

    name: str
    overrides: Overrides
    after: str | None
    against: str
    swept: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """A cell with a seed: one training run in a folder of its own. `after` is the name of the run that it needs."""

    cell: Cell
    seed: int
    recipe: Recipe
    after: str | None

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def folder(self) -> Path:
        return self.recipe.run.folder / self.recipe.run.name

    @property
    def is_done(self) -> bool:
        return _is_done(self.folder)

    @property
    def lacks(self) -> str | None:
        """The run that this one needs, while it is not done."""
        is_there = self.after is None or _is_done(self.recipe.run.folder / self.after)
        return None if is_there else self.after


def plan_runs(comparison: Comparison) -> list[Run]:
    """All runs in the order in which they can be made, seed after seed.

    Raises ConfigError: a cell that makes no recipe, unequal budgets, a cell that has been run with other settings.
    """
    base = merge(merge(default_kinds(Recipe), read_recipe(comparison.recipe)), nested(comparison.settings))
    cells = list(_distinct(_in_order(list(_cells(comparison))), comparison, base))
    runs = [_run(comparison, base, cell, seed) for seed in comparison.seeds for cell in cells]
    _check_budgets(runs)
    for run in runs:
        _check_unchanged(run)
    return runs


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def chosen_runs(runs: list[Run], cells: Sequence[str]) -> list[Run]:
    """Those of these cells; all, if none is named."""
    names = {run.cell.name for run in runs}
    if unknown := [cell for cell in cells if cell not in names]:
        raise ConfigError(
            f"--cells: {unknown[0]} is no cell of this comparison. Choose among {', '.join(sorted(names))}."
        )
    return [run for run in runs if not cells or run.cell.name in cells]


def _cells(comparison: Comparison) -> Iterator[Cell]:
    """Those of every cell first; an objective with `cells` of its own is beside them, and its cells are not swept."""
    everywhere, beside = {}, {}
    for objective, body in comparison.objectives.items():
        changes = nested(body)
        among = changes.pop("cells", None)
        if among is None:
            everywhere[objective] = changes
        else:
            beside[objective] = _named_cells(comparison, objective, among), changes
    for objective, changes in (everywhere or {"": {}}).items():
        yield from _crossed(comparison, objective, list(comparison.cells), changes, comparison.sweeps)
    for objective, (among, changes) in beside.items():
        yield from _crossed(comparison, objective, among, changes, {})


def _named_cells(comparison: Comparison, objective: str, among: Any) -> list[str]:
    """Of `objectives.OBJECTIVE.cells`: in the order of the file."""
    field = f"objectives.{objective}.cells"
    if not isinstance(among, list) or not among:
        raise ConfigError(f"{field} is {among!r}. Give a list of cells, or remove it to have all of them.")
    for name in among:
        known_cell(comparison, field, name)
        after = comparison.cells[name].get("after")
        if after is not None and after not in among:
            raise ConfigError(f"{field} has {name}, which comes after {after}. Add {after}.")
    return [name for name in comparison.cells if name in among]


def _crossed(
    comparison: Comparison, objective: str, among: Sequence[str], changes: Overrides, sweeps: Mapping[str, Any]
) -> Iterator[Cell]:
    """These cells with one objective, and their swept variants."""
    suffix = f".{objective}" if objective else ""
    reference = comparison.reference or next(iter(comparison.cells))
    reference = reference if reference in among else among[0]
    for short in among:
        own = nested(comparison.cells[short])
        after = own.pop("after", None)
        if after is not None:
            known_cell(comparison, f"cells.{short}.after", after)
            after += suffix
        name, own = short + suffix, merge(own, changes)
        yield Cell(name, own, after, reference + suffix)
        swept = sweeps.get(short, {})
        for setting, values in swept.items():
            for value in values:
                changed = merge(own, nested({setting: value}))
                yield Cell(f"{name}.{_label(setting, value, swept)}", changed, after, name, (setting, value))


def _label(setting: str, value: Any, sweeps: Mapping[str, Any]) -> str:
    """ "window-8" of stop.window; with its sections where another swept setting ends alike."""
    last = setting.rpartition(".")[2]
    alike = sum(other.rpartition(".")[2] == last for other in sweeps) > 1
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{setting if alike else last}-{text}")


def _in_order(cells: list[Cell]) -> list[Cell]:
    """Each cell behind the one that it needs, otherwise as in the file."""
    by_name = {cell.name: cell for cell in cells}
    if len(by_name) < len(cells):
        twice = next(cell.name for i, cell in enumerate(cells) if cell.name in [other.name for other in cells[:i]])
        raise ConfigError(f"Two cells are called {twice}. Rename one, or remove a value that is swept twice.")

    def depth(cell: Cell) -> int:
        seen = [cell.name]
        while (after := by_name[seen[-1]].after) is not None:
            if after in seen:
                raise ConfigError(
                    f"cells: after goes round in a circle: {' -> '.join([*seen, after])}. Remove one of them."
                )
            seen.append(after)
        return len(seen)

    return sorted(cells, key=depth)


def _distinct(cells: list[Cell], comparison: Comparison, base: Overrides) -> Iterator[Cell]:
    """Without variants that are the cell itself, whose value need not be left out of a sweep."""
    by_name = {cell.name: cell for cell in cells}
    seed = comparison.seeds[0]
    for cell in cells:
        if cell.swept is not None:
            own, other = (_run(comparison, base, each, seed).recipe for each in (cell, by_name[cell.against]))
            if _settings(own) == _settings(other):
                continue
        yield cell


def _run(comparison: Comparison, base: Overrides, cell: Cell, seed: int) -> Run:
    folder, name = comparison.folder, f"{cell.name}-seed{seed}"
    after = f"{cell.after}-seed{seed}" if cell.after else None
    words = {"seed": str(seed), "folder": str(folder)} | ({"after": str(folder / after)} if after else {})
    overrides = filled(cell.overrides, words)
    if "{after}" in str(overrides):
        raise ConfigError(f"cells.{cell.name} speaks of {{after}}, but has no after. Say after which cell it is run.")
    place = {"run": {"name": name, "folder": str(folder), "seed": seed}}
    try:
        recipe = Recipe.model_validate(merge(merge(base, overrides), place))
    except ValidationError as error:
        raise ConfigError(f"cells.{cell.name}: {explain(error, Recipe)}") from None
    return Run(cell, seed, recipe, after)


def _check_budgets(runs: list[Run]) -> None:
    first = runs[0]
    for run in runs:
        train, cell = run.recipe.train, run.cell.name
        if train.steps is None:
            raise ConfigError(
                f"train.steps is null in cell {cell}. Give a number, so that the budgets can be compared."
            )
        if not run.recipe.evaluation.every_benchmark():
            raise ConfigError(
                f"evaluation.data and evaluation.benchmarks are null in cell {cell}. Name the problems that the students shall solve."
            )
        if _budget(run.recipe) != _budget(first.recipe):
            raise ConfigError(
                f"Cell {cell} has {_words(run.recipe)} and cell {first.cell.name} {_words(first.recipe)} (train.steps x "
                "rollout.prompts_per_step, and rollout.samples_per_prompt). Make them equal."
            )
        for section in SHARED:
            if getattr(run.recipe, section) != getattr(first.recipe, section):
                raise ConfigError(
                    f"Section {section} of cell {cell} differs from that of {first.cell.name}. Change it for all of them, in the recipe."
                )


def _budget(recipe: Recipe) -> tuple[int, int]:
    """Prompts, and rollouts of each."""
    return (recipe.train.steps or 0) * recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt


def _words(recipe: Recipe) -> str:
    prompts, samples = _budget(recipe)
    return f"{prompts} prompts with {samples} rollouts each"


def _check_unchanged(run: Run) -> None:
    """A run that is finished or under way was made with the settings of today."""
    file = run.folder / "config.yaml"
    if not file.exists() or not (run.is_done or (run.folder / "checkpoints").exists()):
        return
    try:
        then = Recipe.model_validate(yaml.safe_load(file.read_text()))
    except (ValidationError, yaml.YAMLError):
        raise ConfigError(f"{file} is no recipe of this katds. Remove {run.folder}, or give another folder.") from None
    before, now = _settings(then), _settings(run.recipe)
    for setting in sorted(before.keys() | now.keys()):
        if before.get(setting) != now.get(setting):
            raise ConfigError(
                f"{setting} of cell {run.cell.name} is {now.get(setting)!r}, but {run.folder} was run with "
                f"{before.get(setting)!r}. Take the old value, remove that folder, or give another folder."
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All settings by their dotted names, without those that say how a run is called and gone on with."""
    every = flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in every if key not in ("run.name", "run.folder", "run.resume")}
