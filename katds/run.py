"""Composition root: recipe -> objects. The only place where a `kind` becomes an object.

Order: everything that can be checked without weights is checked before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from katds.cli import dump_recipe
from katds.config import Recipe
from katds.core.collective import Collective
from katds.core.objectives import OBJECTIVES
from katds.core.stop import STOP_RULES
from katds.core.stop.base import RunFacts, StopRule
from katds.core.stop.simple import NeverRule
from katds.core.types import Rollout
from katds.data.grading import Grader, make_grader
from katds.data.prompts import PromptSet, load_prompts
from katds.errors import CheckpointError, ConfigError, KatdsError
from katds.evaluation.evaluator import Evaluator, text_decoder
from katds.evaluation.metrics import Scores
from katds.models.checks import ModelFacts, check_models
from katds.parallel import checkpoint
from katds.parallel.deepspeed_config import read_deepspeed_json
from katds.parallel.world import World, seed_everything, start_world
from katds.parallel.zero import ZeroFrozen, ZeroStudent, load_frozen, load_student
from katds.rollout.engine import EngineSettings, PhaseClock, RolloutEngine, StudentSource
from katds.rollout.requests import RequestStream
from katds.rollout.sampling import Sampling
from katds.train.clock import Clock
from katds.train.learner import Learner
from katds.train.monitor import Monitor
from katds.train.schedule import cosine_with_warmup
from katds.train.summary import peak_memory_bytes, summarise, write_summary
from katds.train.trainer import Trainer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a run reads besides weights, checked."""

    tokenizer: Any
    facts: ModelFacts
    prompts: PromptSet
    eval_prompts: PromptSet | None
    grade: Grader | None
    student_json: dict[str, Any]
    teacher_json: dict[str, Any]
    steps: int


def read_inputs(recipe: Recipe) -> Inputs:
    """Reads and checks files; loads no weights.

    Raises:
        ConfigError: the first thing that would make the run fail.
    """
    student_json = read_deepspeed_json(recipe.student.deepspeed, "student.deepspeed")
    teacher_json = read_deepspeed_json(recipe.teacher.deepspeed, "teacher.deepspeed")
    longest = max(recipe.rollout.max_new_tokens, recipe.evaluation.max_new_tokens or 0)
    facts = check_models(recipe.student.path, recipe.teacher.path, recipe.data.max_prompt_tokens, longest)
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.path)
    prompts = load_prompts(recipe.data.train, tokenizer, recipe.data, seed=recipe.run.seed)
    graded = recipe.data.answer_column is not None
    if recipe.evaluation.data is not None and not graded:
        raise ConfigError(
            "data.answer_column is null, but evaluation.data is set. Name the column with the reference answers."
        )
    steps = recipe.train.steps or prompts.steps_for(recipe.train.epochs, recipe.rollout.prompts_per_step)
    grade = make_grader(recipe.evaluation.grader) if graded else None
    return Inputs(
        tokenizer,
        facts,
        prompts,
        _load_eval(recipe, tokenizer, recipe.evaluation.data) if recipe.evaluation.data else None,
        grade,
        student_json,
        teacher_json,
        steps,
    )


def train(recipe: Recipe) -> None:
    """Collective: the whole run, from checks to summary."""
    inputs = read_inputs(recipe)
    world = start_world()
    seed_everything(recipe.run.seed)
    folder = recipe.run.folder / recipe.run.name
    found = on_main(world.collective, lambda: _claim(folder, recipe))
    if found is not None and found.world_size != world.size:
        checkpoint.make_universal(found, world.collective)
    for warning in inputs.facts.warnings if world.is_main else ():
        print(f"warning: {warning}", flush=True)
    student, teacher = _load_models(recipe, inputs, load_universal=found is not None and found.world_size != world.size)
    start = found.step if found is not None else 0
    monitor = Monitor(folder, world.is_main, start, inputs.steps, inputs.tokenizer.decode, recipe.run.rollout_samples)
    trainer = _assemble(recipe, inputs, world, student, teacher, monitor)
    if found is not None:
        checkpoint.load(student.engine, found, world.collective)
        trainer.load_state_dict(found.state)
    store = checkpoint.CheckpointStore(
        folder / "checkpoints", student.engine, world.collective, recipe.checkpoint.keep, recipe,
        lambda: {"identity": _identity(recipe), **trainer.state_dict()},
    )  # fmt: skip
    trainer.train(start, store)
    if recipe.checkpoint.export:
        student.export(folder / "final", inputs.tokenizer)
    monitor.close()
    peak = peak_memory_bytes(world.collective, world.device)
    summary = summarise(
        monitor, steps=inputs.steps, ranks=world.size, graded=trainer.correct is not None, peak_bytes=peak,
        before=trainer.before, after=trainer.after, device=world.device,
    )  # fmt: skip
    on_main(world.collective, lambda: write_summary(folder, summary))


def on_main(collective: Collective, action: Callable[[], T]) -> T:
    """Collective: rank 0 acts, all ranks get the result or raise the same user error."""
    outcome: tuple[T | None, KatdsError | None] = (None, None)
    if collective.rank == 0:
        try:
            outcome = (action(), None)
        except KatdsError as error:
            outcome = (None, error)
    value, failure = collective.gather(outcome)[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def _claim(folder: Path, recipe: Recipe) -> checkpoint.Found | None:
    """Makes the run folder ours, or finds the checkpoint to resume from."""
    if recipe.run.resume:
        found = checkpoint.find_newest(folder / "checkpoints")
        saved = found.state.get("identity", {})
        for field, value in _identity(recipe).items():
            if saved.get(field) != value:
                raise CheckpointError(
                    f"{field} is {value!r}, but {found.folder} was written with {saved.get(field)!r}. "
                    "Resume with the old value, or give another run.name."
                )
        return found
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"run.name: {folder} already holds a run. Give another run.name, set run.resume to go on with it, or remove the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_recipe(recipe))
    return None


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must not change when a run is resumed: prompts, rollout ids and sampling follow from these and the step."""
    return {
        "run.seed": recipe.run.seed,
        "data.train": str(recipe.data.train),
        "rollout.prompts_per_step": recipe.rollout.prompts_per_step,
        "rollout.samples_per_prompt": recipe.rollout.samples_per_prompt,
        "train.minibatches": recipe.train.minibatches,
        "stop.kind": recipe.stop.kind,
    }


def _load_models(recipe: Recipe, inputs: Inputs, load_universal: bool) -> tuple[ZeroStudent, ZeroFrozen]:
    vocabulary = inputs.facts.tokenizer_size
    student = load_student(
        recipe.student.path,
        inputs.student_json,
        vocabulary,
        recipe.train.optimizer,
        recipe.train.activation_checkpointing,
        load_universal,
    )
    return student, load_frozen(
        recipe.teacher.path, inputs.teacher_json, vocabulary, whole=recipe.teacher.gather == "phase"
    )


def _assemble(
    recipe: Recipe, inputs: Inputs, world: World, student: ZeroStudent, teacher: ZeroFrozen, monitor: Monitor
) -> Trainer:
    objective = OBJECTIVES[recipe.objective.kind].from_settings(recipe.objective)
    rollout, optimizer = recipe.rollout, recipe.train.optimizer
    rule = make_rule(recipe, inputs.steps)
    requests = RequestStream(
        inputs.prompts,
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        rollout.max_new_tokens,
        rollout.audit_fraction,
    )
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p)
    engine = RolloutEngine(
        student,
        teacher.reading,
        rule,
        objective.needs,
        world.collective,
        _settings(recipe, inputs.facts, world, sampling),
        monitor.phase,
    )
    total = inputs.steps * recipe.train.minibatches
    learner = Learner(
        student, teacher, objective, world.collective,
        lr=cosine_with_warmup(optimizer.lr, total, optimizer.warmup_fraction, optimizer.final_lr_fraction),
        temperature=sampling.scale, minibatches=recipe.train.minibatches, budget=recipe.train.micro_batch_tokens,
        device=world.device, clock=monitor.phase,
    )  # fmt: skip
    evaluator = None
    if inputs.eval_prompts is not None and inputs.grade is not None:
        evaluator = make_evaluator(
            recipe, inputs.tokenizer, inputs.facts, inputs.eval_prompts, inputs.grade, world, student, monitor.phase
        )
    return Trainer(
        requests, engine, learner, rule, world.collective, monitor,
        steps=inputs.steps,
        evaluate=None if evaluator is None else lambda: evaluator.run().metrics(),
        correct=_correct(inputs),
        evaluate_every=recipe.evaluation.every,
        checkpoint_every=recipe.checkpoint.every,
    )  # fmt: skip


def make_rule(recipe: Recipe, steps: int) -> StopRule:
    rollout = recipe.rollout
    per_step = rollout.prompts_per_step * rollout.samples_per_prompt
    facts = RunFacts(recipe.run.seed, steps, per_step, recipe.train.minibatches, rollout.audit_fraction)
    return STOP_RULES[recipe.stop.kind].from_settings(recipe.stop, facts)


def make_evaluator(
    recipe: Recipe,
    tokenizer: Any,
    facts: ModelFacts,
    prompts: PromptSet,
    grade: Grader,
    world: World,
    student: StudentSource,
    clock: PhaseClock,
) -> Evaluator:
    settings = recipe.evaluation
    sampling = Sampling(settings.temperature, top_p=settings.top_p)
    engine = RolloutEngine(
        student, None, NeverRule(), frozenset(), world.collective, _settings(recipe, facts, world, sampling), clock
    )
    return Evaluator(
        engine, list(prompts), settings.samples, settings.k or settings.samples,
        settings.max_new_tokens or recipe.rollout.max_new_tokens, grade, text_decoder(tokenizer), world.collective,
    )  # fmt: skip


def _settings(recipe: Recipe, facts: ModelFacts, world: World, sampling: Sampling) -> EngineSettings:
    rollout = recipe.rollout
    return EngineSettings(
        rollout.slots,
        rollout.chunk_tokens,
        facts.eos_ids,
        sampling,
        rollout.divergence_top_k,
        recipe.run.seed,
        world.device,
    )


def _load_eval(recipe: Recipe, tokenizer: Any, path: Path) -> PromptSet:
    return load_prompts(
        path, tokenizer, recipe.data, shuffle=False, limit=recipe.evaluation.limit, field="evaluation.data"
    )


def _correct(inputs: Inputs) -> Callable[[Rollout], bool] | None:
    if inputs.grade is None:
        return None
    grade, to_text = inputs.grade, text_decoder(inputs.tokenizer)

    def correct(rollout: Rollout) -> bool:
        answer = rollout.request.prompt.answer
        return answer is not None and grade(to_text(rollout.response_ids), answer)

    return correct


def evaluate(recipe: Recipe) -> Scores:
    """Collective: scores the model at `student.path` on `evaluation.data`; rank 0 writes them below the run folder."""
    if recipe.evaluation.data is None or recipe.data.answer_column is None:
        raise ConfigError(
            "evaluation.data or data.answer_column is null: there is nothing to grade. Name the problems and their answer column."
        )
    student_json = read_deepspeed_json(recipe.student.deepspeed, "student.deepspeed")
    longest = recipe.evaluation.max_new_tokens or recipe.rollout.max_new_tokens
    facts = check_models(recipe.student.path, recipe.student.path, recipe.data.max_prompt_tokens, longest)
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.path)
    prompts = _load_eval(recipe, tokenizer, recipe.evaluation.data)
    grade = make_grader(recipe.evaluation.grader)
    world = start_world()
    student = load_frozen(recipe.student.path, student_json, facts.tokenizer_size)
    evaluator = make_evaluator(recipe, tokenizer, facts, prompts, grade, world, student, Clock())
    scores = evaluator.run()
    on_main(world.collective, lambda: _write_scores(recipe, scores))
    return scores


def _write_scores(recipe: Recipe, scores: Scores) -> None:
    folder = recipe.run.folder / recipe.run.name / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("-".join(recipe.student.path.parts[-3:]).strip("/-") + ".json")
    file.write_text(
        json.dumps(
            {"model": str(recipe.student.path), "data": str(recipe.evaluation.data), **scores.metrics()}, indent=2
        )
        + "\n"
    )
    print(f"{recipe.student.path} on {recipe.evaluation.data}, {scores.problems} problems x {scores.samples} samples")
    for name, value in (("avg@", scores.average), ("pass@", scores.passed)):
        k = scores.samples if name == "avg@" else scores.k
        print(f"  {name + str(k):<12} {value.mean:.3f}  (95% interval {value.low:.3f} .. {value.high:.3f})")
    print(
        f"  {'length':<12} {scores.mean_tokens:.1f} tokens, {scores.finished:.0%} finished\n  written to {file}",
        flush=True,
    )
