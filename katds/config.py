"""The recipe: one typed, validated description of a run.

Order of precedence: defaults < recipe file < dotted flags. Defaults are the published setting of KAT (arXiv 2606.09471)
where the paper states one. `katds.cli` reads files and flags; `katds.assemble` turns `kind` into objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from katds.core.behaviours import BEHAVIOURS, Behaviour
from katds.core.behaviours.student import StudentSettings
from katds.core.objectives import OBJECTIVES, Objective
from katds.core.objectives.reverse_kl import ReverseKlSettings
from katds.core.stop import STOP_RULES
from katds.core.stop.kat_settings import KatSettings
from katds.core.types import Need
from katds.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    WatchConfig,
)
from katds.settings import ByKind, Section


def _any_of(methods: Mapping[str, Any]) -> Any:
    """A section of any kind in the dict when the recipe is read: a new method is a file and a line there, and none here."""
    return Annotated[Any, ByKind(lambda: {kind: method.Settings for kind, method in methods.items()})]


StopConfig: Any = _any_of(STOP_RULES)
BehaviourConfig: Any = _any_of(BEHAVIOURS)
ObjectiveConfig: Any = _any_of(OBJECTIVES)


class Recipe(Section):
    """One run of on-policy distillation."""

    run: RunConfig
    student: ModelConfig
    teacher: TeacherConfig
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], TeacherConfig] = Field(
        default_factory=dict,
        description="further teachers by name, each for the prompts that name it in data.teacher_column",
    )
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    behaviour: BehaviourConfig = StudentSettings()
    stop: StopConfig = KatSettings()
    objective: ObjectiveConfig = ReverseKlSettings()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        rollout, train = self.rollout, self.train
        self.stop.check(rollout.max_new_tokens, rollout.temperature, rollout.audit_fraction)
        filtered = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0 or rollout.temperature == 0
        self.objective.check(filtered, train.minibatches, blended=self.behaviour.blends)
        self.behaviour.check(greedy=rollout.temperature == 0)
        if self.behaviour.blends:
            kind = f"behaviour.kind {self.behaviour.kind}"
            _check_whole_teacher(self, f"{kind} lets the teacher take every step beside the student")
            if rollout.overlap:
                raise ValueError(f"{kind} needs the teacher while the student writes; set rollout.overlap to false")
        for choice in self._letting_the_teacher_write():
            _check_whole_teacher(self, f"{choice} lets the teacher write")
        if bool(self.teachers) != (self.data.teacher_column is not None):
            given, missing = (
                ("teachers", "data.teacher_column") if self.teachers else ("data.teacher_column", "teachers")
            )
            raise ValueError(f"{given} is given, but {missing} is not; give both, or neither")
        if self.teachers and Need.FULL in OBJECTIVES[self.objective.kind].from_settings(self.objective).needs:
            raise ValueError(
                f"an objective over the whole vocabulary needs the head of one teacher, but teachers names {', '.join(self.teachers)}; "
                "take an objective over the top k, or one teacher"
            )
        if self.objective.aligns_text:
            _check_aligned(self)
        elif self.data.chat_template == "teacher":
            raise ValueError(
                f"data.chat_template is teacher, but with objective.kind {self.objective.kind} both models read the same tokens; set it to "
                "true or false"
            )
        self.reward.check(filtered, self.behaviour.blends, self.data.answer_column is not None)
        if train.minibatches > rollout.prompts_per_step * rollout.samples_per_prompt:
            raise ValueError(
                f"train.minibatches {train.minibatches} exceeds the rollouts of a step (rollout.prompts_per_step "
                f"{rollout.prompts_per_step} x rollout.samples_per_prompt {rollout.samples_per_prompt}); lower it"
            )
        self.evaluation.check()
        self.run.check()
        return self

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes text of its own, for the behaviour policy or the objective."""
        return bool(self._letting_the_teacher_write())

    def _letting_the_teacher_write(self) -> list[str]:
        """The choices that do."""
        chosen: dict[str, type[Behaviour] | type[Objective]] = {
            "behaviour": BEHAVIOURS[self.behaviour.kind],
            "objective": OBJECTIVES[self.objective.kind],
        }
        return [f"{name}.kind {getattr(self, name).kind}" for name, method in chosen.items() if method.teacher_writes]

    def every_teacher(self) -> dict[str, TeacherConfig]:
        """Section -> teacher: `teacher` first, then `teachers` in order; a prompt's `teacher` counts them."""
        return {"teacher": self.teacher, **{f"teachers.{name}": each for name, each in self.teachers.items()}}


def _check_whole_teacher(recipe: Recipe, choice: str) -> None:
    """Raises ValueError where `choice` needs one teacher, and the whole of it on a rank, and cannot have it."""
    if recipe.teachers:
        raise ValueError(
            f"{choice}, which needs a single one, but teachers names {', '.join(recipe.teachers)}; remove them"
        )
    if recipe.teacher.gather == "layer":
        raise ValueError(
            f"{choice}, which a rank can only do with the whole of it, but teacher.gather layer never holds it whole; set "
            "teacher.gather to phase or once"
        )


def _check_aligned(recipe: Recipe) -> None:
    """Raises ValueError where a teacher that reads text in tokens of its own does not fit."""
    kind = f"objective.kind {recipe.objective.kind}"
    if recipe.teachers:
        raise ValueError(
            f"{kind} aligns the text with one teacher's, but teachers names {', '.join(recipe.teachers)}; remove them"
        )
    if recipe.teacher_writes:
        raise ValueError(
            f"{kind} is for a teacher with tokens of its own, which the student could not go on from; set behaviour.kind to student"
        )
    if recipe.behaviour.blends:
        raise ValueError(
            f"{kind} is for a teacher with tokens of its own, but behaviour.kind {recipe.behaviour.kind} lets both models choose each "
            "token; set behaviour.kind to student"
        )
    if recipe.stop.reads_teacher_top_k:
        raise ValueError(f"{kind} compares chunks of text, so that stop.support would do nothing; remove it")
    if recipe.rollout.overlap:
        raise ValueError(
            f"{kind} looks at what was written before the teacher reads it: nothing is left to overlap; set rollout.overlap to false"
        )
