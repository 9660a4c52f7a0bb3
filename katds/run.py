"""A run from its first check to its summary.

Order: everything that can be checked without weights is checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from katds.assemble import assemble, correctness
from katds.cli import dump_recipe
from katds.config import Recipe
from katds.errors import unloadable
from katds.inputs import Inputs, fingerprint, identity, read_inputs
from katds.parallel import checkpoint
from katds.parallel.agree import on_main, same_everywhere, together, visible_everywhere
from katds.parallel.offload import in_own_folder, remove_files, uncheckable
from katds.parallel.shards import block_size
from katds.parallel.world import World, at_loss, report_traffic, seed_everything, start_world
from katds.parallel.zero import ZeroFrozen, ZeroStudent, load_frozen, load_student
from katds.signals import listening
from katds.startup import check_ranks, claim, deepspeed_jsons, run_folder
from katds.train.interruption import Interruption
from katds.train.memory import peak_memory_bytes
from katds.train.monitor import Monitor
from katds.train.samples import describe
from katds.train.summary import summarise, write_summary
from katds.train.timeline import Timeline
from katds.train.trainer import Trainer
from katds.train.writers import Watched, Writer, check_trackers, open_writers

_BEFORE = "came before training. Nothing is lost: the same command begins, or goes on from the newest checkpoint."


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready for its step `start`."""

    recipe: Recipe
    inputs: Inputs
    world: World
    student: ZeroStudent
    monitor: Monitor
    trainer: Trainer
    store: checkpoint.CheckpointStore
    start: int

    @property
    def folder(self) -> Path:
        return run_folder(self.recipe)


def train(recipe: Recipe) -> bool:
    """Collective: the whole run, from checks to summary. False if a signal ended it before: it is saved, and can be resumed. Raises
    Interrupted if the signal came before training."""
    with listening():
        run = open_run(recipe)
        with run.monitor.told_of_failure():
            finished = _train(run)
        run.world.collective.barrier()  # or a rank would miss its files
        for role, settings in deepspeed_jsons(recipe, run.inputs).items():
            remove_files(settings, recipe.run.name, role)
        return finished


def _train(run: Run) -> bool:
    recipe, monitor, trainer, world = run.recipe, run.monitor, run.trainer, run.world
    interruption = Interruption(world.collective)
    if not trainer.train(run.start, run.store, interruption.asked):
        monitor.say(f"{interruption.name}: saved in {run.folder / 'checkpoints'}; go on with --run.resume")
        monitor.close()
        return False
    if recipe.checkpoint.export:
        run.student.export(run.folder / "final", run.inputs.tokenizer, recipe.rollout.end_tokens)
    monitor.stop()
    summary = summarise(
        monitor, steps=run.inputs.steps, ranks=world.size, graded=trainer.correct is not None,
        peak_bytes=peak_memory_bytes(world.collective, world.device), before=trainer.before, after=trainer.after,
        device=world.device,
    )  # fmt: skip
    on_main(world.collective, lambda: write_summary(run.folder, summary))
    monitor.close(summary)
    report_traffic()
    return True


def open_run(recipe: Recipe) -> Run:
    """Collective: all that comes before the first step, from checks to the state of the checkpoint that is resumed. Nothing of an
    earlier state is touched before models and checkpoint are loaded."""
    world = start_world(
        lost_after_seconds=recipe.run.lost_after_seconds,
        advice="Start it again on the hosts that are left, with --run.resume auto: it goes on from the newest checkpoint in "
        f"{run_folder(recipe) / 'checkpoints'}.",
    )
    collective = world.collective
    seed_everything(recipe.run.seed)
    interruption = Interruption(collective)
    inputs = together(collective, lambda: read_inputs(recipe))
    same_everywhere(collective, fingerprint(recipe, inputs))
    interruption.leave_if_asked(_BEFORE)
    together(collective, lambda: check_ranks(recipe, inputs, world.size), uncheckable)
    blocks = [block_size(each.shard, collective, name) for name, each in recipe.every_teacher().items()]
    folder = run_folder(recipe)
    on_main(collective, lambda: check_trackers(recipe.watch))
    found = on_main(collective, lambda: claim(folder, recipe, identity(recipe, inputs)))
    visible_everywhere(collective, folder / "config.yaml", "run.folder")
    reshard = found is not None and found.world_size != world.size
    if found is not None and reshard:
        checkpoint.make_universal(found, collective)
    interruption.leave_if_asked(_BEFORE)
    student, teachers = _load_models(recipe, inputs, world, blocks, reshard)
    interruption.leave_if_asked(_BEFORE)
    start = 0
    if found is not None:
        checkpoint.load(student, found, collective)
        start = found.step
    interruption.leave_if_asked(_BEFORE)
    monitor = _monitor(recipe, inputs, world, start)
    with monitor.told_of_failure():
        for warning in inputs.facts.warnings:
            monitor.say(f"warning: {warning}")
        trainer = assemble(recipe, inputs, world, student, teachers, monitor)
        if found is not None:
            trainer.load_state_dict(found.state)
        store = checkpoint.CheckpointStore(
            folder / "checkpoints", student.engine, collective, recipe.checkpoint.keep, recipe,
            lambda: {"identity": identity(recipe, inputs), **trainer.state_dict()},
        )  # fmt: skip
    return Run(recipe, inputs, world, student, monitor, trainer, store, start)


def _monitor(recipe: Recipe, inputs: Inputs, world: World, start: int) -> Monitor:
    """Collective."""
    folder, writers = run_folder(recipe), list[Writer]()
    watched = Watched(folder, recipe.run.name, start, inputs.steps, dump_recipe(recipe), recipe.model_dump(mode="json"))
    on_main(world.collective, lambda: writers.extend(open_writers(recipe.watch, watched, tqdm.write)))
    shown = partial(describe, decode=inputs.tokenizer.decode, correct=correctness(recipe, inputs))
    timeline = Timeline(folder, world.collective, start)
    monitor = Monitor(
        timeline, world.collective, world.device, start, inputs.steps, shown, recipe.run.rollout_samples, writers
    )
    at_loss(monitor.fail)
    return monitor


def _load_models(
    recipe: Recipe, inputs: Inputs, world: World, blocks: Sequence[int], load_universal: bool
) -> tuple[ZeroStudent, list[ZeroFrozen]]:
    """Collective. `blocks`: of each teacher, how many ranks share its shards."""
    collective = world.collective
    vocabulary, optimizer = inputs.facts.tokenizer_size, recipe.train.optimizer
    checkpointing, student_path = recipe.train.activation_checkpointing, recipe.student.path
    keep_copy = recipe.rollout.weights == "copy"
    jsons = {role: in_own_folder(json, recipe.run.name, role) for role, json in deepspeed_jsons(recipe, inputs).items()}
    student = together(
        collective,
        lambda: load_student(
            student_path, jsons["student"], vocabulary, optimizer, checkpointing, load_universal, keep_copy
        ),
        unloadable("student", student_path, recipe.student.deepspeed),
    )
    teachers = [
        together(
            collective,
            partial(
                load_frozen,
                teacher.path,
                jsons[name],
                inputs.teacher_vocabulary,
                teacher.gather,
                world.block(ranks).group,
            ),
            unloadable(name, teacher.path, teacher.deepspeed),
        )
        for (name, teacher), ranks in zip(recipe.every_teacher().items(), blocks, strict=True)
    ]
    return student, teachers
