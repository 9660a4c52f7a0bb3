"""What a run checks of its ranks and its folder before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from katds.cli import dump_recipe
from katds.config import Recipe
from katds.errors import CheckpointError, ConfigError
from katds.files import replace_text, whole_name
from katds.inputs import Inputs, at_default, is_free
from katds.parallel import checkpoint
from katds.parallel.deepspeed_config import teacher_config
from katds.parallel.offload import check_offload
from katds.parallel.sequence import check_shards
from katds.parallel.shards import check_hpz
from katds.schema import flat

# What may be in a run's folder before it has begun to train.
FREE = {"config.yaml", "evaluations", "trackers.json", "wandb"}


def check_ranks(recipe: Recipe, inputs: Inputs, ranks: int) -> None:
    """Raises ConfigError for what does not divide so many ranks, and for what this machine cannot offload."""
    check_shards(recipe.train.sequence_parallel, ranks, recipe.student.path)
    check_hpz(inputs.student_json, ranks, "student")
    for (name, each), settings in zip(recipe.every_teacher().items(), inputs.teacher_jsons, strict=True):
        check_hpz(settings, ranks, name, each.shard)
    for role, settings in deepspeed_jsons(recipe, inputs).items():
        check_offload(settings, role)


def deepspeed_jsons(recipe: Recipe, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Section -> DeepSpeed JSON of each model; a teacher has no optimizer, whatever its file says."""
    teachers = map(teacher_config, inputs.teacher_jsons)
    return {"student": inputs.student_json, **dict(zip(recipe.every_teacher(), teachers, strict=True))}


def run_folder(recipe: Recipe) -> Path:
    return recipe.run.folder / recipe.run.name


def _unsaved(folder: Path) -> bool:
    """Whether a run has left its folder before it had anything to go on from: nothing in there will be missed."""
    return not any((folder / name).exists() for name in ("final", "summary.json"))


def _held(folder: Path) -> set[str]:
    """What is in there, by the names of what is whole."""
    return {whole_name(path.name) for path in folder.iterdir()}


def claim(folder: Path, recipe: Recipe, mine: Mapping[str, Any]) -> checkpoint.Found | None:
    """Makes the run folder ours, or finds the checkpoint to resume from. A run that has not begun to train leaves its
    folder free."""
    automatic, saved_steps = recipe.run.resume == "auto", checkpoint.complete_steps(folder / "checkpoints")
    found = (
        checkpoint.find_newest(folder / "checkpoints") if recipe.run.resume and (saved_steps or not automatic) else None
    )
    if found is not None:
        saved = dict(flat(found.state.get("identity", {})))  # an older katds saved a list of sections as one setting
        # An older katds may have saved what is free to change by now, and did not know every setting of today: their defaults
        # are what it did.
        unknown = at_default(recipe) - saved.keys()
        for field in sorted((mine.keys() - unknown) | {key for key in saved if not is_free(key)}):
            if saved.get(field) != mine.get(field):
                raise CheckpointError(
                    f"{field} is {mine.get(field)!r}, but {found.folder} was written with {saved.get(field)!r}. "
                    "Resume with the old value, or give another run.name."
                )
    elif folder.exists() and not (automatic and _unsaved(folder)) and _held(folder) - FREE:
        raise ConfigError(
            f"run.name: {folder} already holds a run. Give another run.name, set run.resume to go on with it, or "
            "remove the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", dump_recipe(recipe))
    return found
