"""Recipe -> objects. The only place where a `kind` becomes an object."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from katds.config import Recipe
from katds.core.behaviours import BEHAVIOURS, Behaviour
from katds.core.objectives import OBJECTIVES, Objective
from katds.core.objectives.rewarded import Rewarded
from katds.core.stop import STOP_RULES
from katds.core.stop.base import RunFacts, StopRule
from katds.core.stop.simple import NeverRule
from katds.core.types import Rollout
from katds.data.benchmarks import Benchmark
from katds.data.grading import Grader
from katds.evaluation.evaluator import Evaluator, text_decoder
from katds.inputs import Inputs
from katds.models.checks import ModelFacts
from katds.parallel.sequence import UlyssesShards
from katds.parallel.world import World
from katds.parallel.zero import ZeroFrozen, ZeroStudent
from katds.rollout.engine import PhaseClock, RolloutEngine, StudentSource
from katds.rollout.guided import GuidedEngine
from katds.rollout.requests import RequestStream
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.rollout.writer import TeacherPen, teacher_engine
from katds.train.learner import Learner
from katds.train.monitor import Monitor
from katds.train.schedule import cosine_with_warmup
from katds.train.trainer import Engine, Trainer


def assemble(
    recipe: Recipe, inputs: Inputs, world: World, student: ZeroStudent,
    teachers: Sequence[ZeroFrozen], monitor: Monitor,
) -> Trainer:  # fmt: skip
    """The training loop of a recipe around loaded models."""
    objective = _objective(recipe, inputs)
    rollout, optimizer = recipe.rollout, recipe.train.optimizer
    rule = make_rule(recipe, inputs.steps)
    for line in about_rule(recipe, inputs.steps):
        monitor.say(line)
    requests = RequestStream(
        inputs.prompts,
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        rollout.max_new_tokens,
        rollout.audit_fraction,
    )
    sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p)
    sizes = replace(engine_settings(recipe, inputs.facts, world, sampling), teacher_top_k=objective.teacher_top_k)
    behaviour = make_behaviour(recipe, inputs.steps)
    say = speaker(world, monitor.say)
    by_student = RolloutEngine(
        student, [teacher.reading for teacher in teachers], rule, objective.needs, world.collective, sizes, monitor.phase, say,
        behaviour, None if inputs.bridge is None else inputs.bridge.begin,
        world.block(math.lcm(*(teacher.ranks for teacher in teachers))),
    )  # fmt: skip
    by_teacher = partial(_teacher_engine, teachers[0], world, inputs.facts, sizes, monitor.phase, say)
    engine: Engine = by_student
    if behaviour.teacher_writes:
        engine = GuidedEngine(
            by_student, by_teacher(objective.reads_prefix), behaviour, objective.reads_prefix, world.collective, recipe.run.seed,
            world.device, monitor.phase,
        )  # fmt: skip
    pen = None
    if objective.teacher_writes:
        pen = partial(TeacherPen, by_teacher(False), teachers[0], world.collective, monitor.phase, inputs.facts.context)
    if rollout.overlap and (reason := _no_overlap(recipe, inputs, world)):
        monitor.say(f"warning: rollout.overlap only costs a chunk per rollout here: {reason}")
    total = inputs.steps * recipe.train.minibatches
    learner = Learner(
        student, teachers[0], objective, world.collective, steps=inputs.steps, seed=recipe.run.seed,
        lr=cosine_with_warmup(optimizer.lr, total, optimizer.warmup_fraction, optimizer.final_lr_fraction),
        temperature=sampling.scale, minibatches=recipe.train.minibatches, budget=recipe.train.micro_batch_tokens,
        device=world.device, clock=monitor.phase, attention_weight=student.engine.module.attention_weight(), pen=pen,
        shards=UlyssesShards(recipe.train.sequence_parallel) if recipe.train.sequence_parallel > 1 else None,
    )  # fmt: skip
    evaluator = None
    if inputs.benchmarks and inputs.grade is not None:
        evaluator = make_evaluator(
            recipe, inputs.tokenizer, inputs.facts, inputs.benchmarks, inputs.grade, world, student, monitor.phase
        )
    return Trainer(
        requests, engine, learner, rule, world.collective, monitor,
        steps=inputs.steps,
        evaluate=None if evaluator is None else lambda: evaluator.run().metrics(),
        correct=correctness(recipe, inputs),
        evaluate_every=recipe.evaluation.every,
        checkpoint_every=recipe.checkpoint.every,
    )  # fmt: skip


def _teacher_engine(
    teacher: ZeroFrozen,
    world: World,
    facts: ModelFacts,
    sizes: EngineSettings,
    clock: PhaseClock,
    say: Callable[[str], None],
    scored: bool,
) -> RolloutEngine:
    """The teacher as a writer, beside engines of these sizes. Its texts end at the end tokens of either model: beyond its own, a teacher
    would write what it was never trained to."""
    # Its cache is not worth its memory while the student writes and learns, and nothing scores what it has written.
    sizes = replace(
        sizes, eos_ids=facts.every_eos, top_k=sizes.teacher_top_k or sizes.top_k, keep_decoder=False, overlap=False
    )
    return teacher_engine(teacher, scored, world.collective, sizes, clock, say)


def _objective(recipe: Recipe, inputs: Inputs) -> Objective:
    objective = make_objective(recipe)
    if inputs.reward is None:
        return objective
    reward, to_text = inputs.reward, text_decoder(inputs.tokenizer)

    def value(rollout: Rollout) -> float:
        prompt = rollout.request.prompt
        return reward(to_text(prompt.token_ids), to_text(rollout.full_ids), prompt.answer)

    return Rewarded(objective, recipe.reward.weight, value)


def make_objective(recipe: Recipe) -> Objective:
    """Without the reward."""
    return OBJECTIVES[recipe.objective.kind].from_settings(recipe.objective)


def make_behaviour(recipe: Recipe, steps: int) -> Behaviour:
    return BEHAVIOURS[recipe.behaviour.kind].from_settings(recipe.behaviour, steps)


def _no_overlap(recipe: Recipe, inputs: Inputs, world: World) -> str | None:
    """Why the teacher will not read beside the student."""
    if world.device.type != "cuda":
        return "there is no GPU"
    for (name, teacher), settings in zip(recipe.every_teacher().items(), inputs.teacher_jsons, strict=True):
        if teacher.gather == "layer" and settings["zero_optimization"].get("overlap_comm") is False:
            return f"overlap_comm is false in {name}.deepspeed, so its gathers queue behind the student's chunk"
    return None


def speaker(world: World, say: Callable[[str], None]) -> Callable[[str], None]:
    """For what a node finds out by itself, such as that it has no compiler: one slow node makes all ranks wait. One line per node."""
    if world.is_main:
        return say
    if os.environ.get("LOCAL_RANK") == "0":
        return lambda line: print(f"rank {world.rank}: {line}", file=sys.stderr, flush=True)
    return lambda _: None


def make_rule(recipe: Recipe, steps: int) -> StopRule:
    return STOP_RULES[recipe.stop.kind].from_settings(recipe.stop, _run_facts(recipe, steps))


def about_rule(recipe: Recipe, steps: int) -> list[str]:
    """What the stop rules, all of them under first_of, settle by themselves, and what they will do that is hardly meant."""
    facts = _run_facts(recipe, steps)
    return [*recipe.stop.choices(facts), *(f"warning: {doubt}" for doubt in recipe.stop.doubts(facts))]


def _run_facts(recipe: Recipe, steps: int) -> RunFacts:
    rollout = recipe.rollout
    per_step = rollout.prompts_per_step * rollout.samples_per_prompt
    return RunFacts(recipe.run.seed, steps, per_step, recipe.train.minibatches, rollout.audit_fraction)


def make_evaluator(
    recipe: Recipe,
    tokenizer: Any,
    facts: ModelFacts,
    benchmarks: Sequence[Benchmark],
    grade: Grader,
    world: World,
    student: StudentSource,
    clock: PhaseClock,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluator:
    settings = recipe.evaluation
    sampling = Sampling(settings.temperature, top_p=settings.top_p)
    # Evaluations are rare: between them their cache is not worth its memory.
    sizes = replace(engine_settings(recipe, facts, world, sampling), keep_decoder=False, overlap=False)
    engine = RolloutEngine(student, (), NeverRule(), frozenset(), world.collective, sizes, clock, say)
    longest = settings.max_new_tokens or recipe.rollout.max_new_tokens
    return Evaluator(engine, benchmarks, longest, grade, text_decoder(tokenizer), world.collective)


def engine_settings(recipe: Recipe, facts: ModelFacts, world: World, sampling: Sampling) -> EngineSettings:
    rollout = recipe.rollout
    return EngineSettings(
        rollout.slots,
        rollout.chunk_tokens,
        facts.eos_ids,
        sampling,
        rollout.divergence_top_k,
        recipe.run.seed,
        world.device,
        fast_decode=rollout.fast_decode,
        keep_decoder=rollout.weights == "copy",
        overlap=rollout.overlap,
    )


def correctness(recipe: Recipe, inputs: Inputs) -> Callable[[Rollout], bool | None] | None:
    """Grades a complete rollout of the training prompts; None where these have no answers."""
    if inputs.grade is None or recipe.data.answer_column is None:
        return None
    grade, to_text = inputs.grade, text_decoder(inputs.tokenizer)

    def correct(rollout: Rollout) -> bool | None:
        answer = rollout.request.prompt.answer
        return None if answer is None else grade(to_text(rollout.full_ids), answer)

    return correct
