"""The recipe: one typed, validated description of a run.

Order of precedence: defaults < recipe file < dotted flags. Defaults are the published setting of KAT (arXiv 2606.09471)
where the paper states one. `katds.cli` reads files and flags; `katds.run` turns `kind` into objects.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NUMBERS = {int, float, type(None)}


def leaf_types(annotation: Any) -> set[Any]:
    """The types that a value may have: `Annotated[int, ...] | None` gives {int, NoneType}; `tuple[int]`, {tuple}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaf_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(leaf_types, get_args(annotation)))
    return {origin or annotation}


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Nucleus = Annotated[float, Field(gt=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Frozen; an unknown key is an error. Docstrings and descriptions of its subclasses are the text of `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, data: Any) -> Any:
        for name, info in cls.model_fields.items():
            # pydantic would read `window: yes` as 1.
            if isinstance(data, dict) and isinstance(data.get(name), bool) and leaf_types(info.annotation) <= NUMBERS:
                raise PydanticCustomError("truth_value", "a truth value is not a number", {"field": name})
        return data


class ModelConfig(Section):
    """A model, and how DeepSpeed holds it."""

    path: Path = Field(description="Hugging Face folder (config.json, *.safetensors, tokenizer)")
    deepspeed: Path = Field(
        Path("ds_configs/zero3_bf16.json"), description="DeepSpeed JSON: ZeRO, precision and offload only"
    )


class DataConfig(Section):
    """Training prompts."""

    train: Path = Field(description="file or folder: .jsonl, .json, .csv, .parquet or a saved Hugging Face dataset")
    prompt_column: str = Field("prompt", description="column with the prompt: text, or a list of {role, content}")
    answer_column: str | None = Field("answer", description="column with the reference answer; null if there is none")
    chat_template: bool = Field(True, description="render prompts through the student tokenizer's chat template")
    template_options: dict[str, bool | int | str] = Field(
        default_factory=dict, description="extra arguments of the chat template, e.g. enable_thinking: false"
    )
    max_prompt_tokens: Positive = Field(1024, description="a longer prompt is an error")
    shuffle: bool = Field(True, description="a new order each epoch, from run.seed")


class RolloutConfig(Section):
    """How the student writes."""

    prompts_per_step: Positive = Field(128, description="prompts of one step, over all ranks")
    samples_per_prompt: Positive = Field(1, description="rollouts per prompt; the prompt is prefilled once")
    max_new_tokens: Positive = Field(4096, description="longest response")
    slots: Positive = Field(32, description="rollouts that a rank writes at the same time")
    chunk_tokens: Positive = Field(
        64, description="tokens decoded between two looks of the teacher: more costs fewer gathers, fewer stops sooner"
    )
    temperature: Scale = Field(1.0, description="0 decodes greedily")
    top_p: Nucleus = Field(0.95, description="nucleus sampling; 1 turns it off")
    top_k: Count = Field(0, description="sample among the k most probable tokens; 0 turns it off")
    min_p: Share = Field(0.0, description="drop tokens below min_p x the largest probability; 0 turns it off")
    audit_fraction: Share = Field(
        1 / 16, description="share of rollouts that no rule ends; savings and false terminations are measured on them"
    )
    divergence_top_k: Positive = Field(
        64, description="student tokens that the per-token reverse KL is computed on; the rest is one tail bucket"
    )


class ThresholdConfig(Section):
    """KAT's threshold: a quantile of the smallest window divergences of recent rollouts."""

    eta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="the threshold is the 1-eta quantile of recent rollout minima"
    )
    capacity: Positive = Field(4096, description="minima kept (first in, first out)")
    min_entries: Positive = Field(512, description="nothing is terminated before so many minima are known")
    min_steps: Count = Field(50, description="nothing is terminated in the first so many steps")
    source: Literal["auto", "audit", "completed", "all"] = Field(
        "auto",
        description="whose minima enter: the audit group's (unbiased), those of rollouts that ended by themselves "
        "(biased high), all (biased low); auto: audit if it refills the queue four times in the run, else completed",
    )


class KatConfig(Section):
    """End a rollout once its windowed divergence stays below an adaptive threshold (arXiv 2606.09471)."""

    kind: Literal["kat"] = "kat"
    window: Positive = Field(64, description="W, tokens per window")
    stride: Positive | None = Field(None, description="tokens between windows; default W/4")
    persistence: Positive = Field(4, description="T, consecutive low windows that end a rollout")
    min_kept: Count | None = Field(None, description="L0, no cut before this token; default 2W")
    threshold: ThresholdConfig = ThresholdConfig()

    @property
    def resolved_stride(self) -> int:
        return self.stride if self.stride is not None else max(1, self.window // 4)

    @property
    def resolved_min_kept(self) -> int:
        return self.min_kept if self.min_kept is not None else 2 * self.window


class NeverConfig(Section):
    """Every rollout runs to its end: plain on-policy distillation."""

    kind: Literal["never"] = "never"


class PrefixConfig(Section):
    """Every rollout ends at the same length."""

    kind: Literal["prefix"] = "prefix"
    tokens: Positive = Field(1024, description="length at which every rollout ends")


class RandomConfig(Section):
    """Every rollout ends at a random length: the control for saved tokens."""

    kind: Literal["random"] = "random"
    min_tokens: Positive = Field(1, description="shortest cut")
    max_tokens: Positive = Field(4096, description="longest cut; lengths are uniform in between")

    @model_validator(mode="after")
    def _ordered(self) -> RandomConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"stop.min_tokens {self.min_tokens} is larger than stop.max_tokens {self.max_tokens}; "
                "lower stop.min_tokens"
            )
        return self


StopConfig = Annotated[KatConfig | NeverConfig | PrefixConfig | RandomConfig, Field(discriminator="kind")]


class ReverseKlConfig(Section):
    """KL(student || teacher) at every kept token."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    support: Literal["student_top_k", "full"] = Field(
        "student_top_k", description="student's top K plus a tail bucket (published), or the whole vocabulary (exact)"
    )


class ForwardKlConfig(Section):
    """KL(teacher || student) at every kept token."""

    kind: Literal["forward_kl"] = "forward_kl"
    support: Literal["teacher_top_k", "full"] = Field(
        "teacher_top_k", description="teacher's top K plus a tail bucket, or the whole vocabulary"
    )


class JsdConfig(Section):
    """Generalised Jensen-Shannon divergence over the whole vocabulary at every kept token."""

    kind: Literal["jsd"] = "jsd"
    beta: Share = Field(0.5, description="0 forward KL, 1 reverse KL (GKD, arXiv 2306.13649)")


class PolicyGradientConfig(Section):
    """The sampled token's log-ratio as its reward; the teacher scores one token per position."""

    kind: Literal["policy_gradient"] = "policy_gradient"


ObjectiveConfig = Annotated[
    ReverseKlConfig | ForwardKlConfig | JsdConfig | PolicyGradientConfig, Field(discriminator="kind")
]


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: Rate = Field(1e-6, description="peak learning rate")
    warmup_fraction: Share = Field(0.03, description="share of the optimizer steps with rising rate")
    final_lr_fraction: Share = Field(0.0, description="rate at the end of the cosine, relative to the peak")
    weight_decay: Scale = Field(0.0, description="decoupled weight decay")
    betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="decay of the two moments")
    eps: Rate = Field(1e-8, description="added to the root of the second moment")
    gradient_clip: Rate | None = Field(1.0, description="global gradient norm; null turns it off")


class TrainConfig(Section):
    """How the student learns."""

    steps: Positive | None = Field(None, description="steps to train; default: as many as `epochs` need")
    epochs: Rate = Field(3.0, description="passes over the prompts, where steps is not given")
    minibatches: Positive = Field(
        1, description="optimizer steps per rollout step; rollouts are dealt to them by id (published: 4)"
    )
    micro_batch_tokens: Positive = Field(16384, description="tokens of one packed forward on one rank")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more time"
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class MatchGraderConfig(Section):
    """Right if the extracted text equals the reference answer."""

    kind: Literal["match"] = "match"
    pattern: str = Field(
        r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}",
        description="regular expression; its last match's first group is the answer",
    )


class MathGraderConfig(Section):
    """Right if mathematically equal to the reference answer (math-verify; pip install 'katds[eval]')."""

    kind: Literal["math"] = "math"


GraderConfig = Annotated[MatchGraderConfig | MathGraderConfig, Field(discriminator="kind")]


class EvaluationConfig(Section):
    """Problems that the student solves before, during and after training."""

    data: Path | None = Field(
        None, description="evaluation prompts, same columns as the training data; null: no evaluation"
    )
    samples: Positive = Field(8, description="rollouts per problem, n of avg@k and pass@k")
    k: Positive | None = Field(None, description="k of pass@k; default: samples")
    limit: Positive | None = Field(None, description="only the first so many problems")
    every: Count = Field(0, description="steps between evaluations; 0: before and after training only")
    max_new_tokens: Positive | None = Field(None, description="default: rollout.max_new_tokens")
    temperature: Scale = Field(1.0, description="0 decodes greedily")
    top_p: Nucleus = Field(0.95, description="nucleus sampling; 1 turns it off")
    grader: GraderConfig = MathGraderConfig()


class CheckpointConfig(Section):
    """What is saved, and how often."""

    every: Count = Field(50, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    export: bool = Field(True, description="write the final student as a Hugging Face folder")


class RunConfig(Section):
    """Name, place and seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="folder of the run below run.folder: letters, digits and . _ -"
    )
    folder: Path = Field(Path("runs"), description="where runs are written")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of the prompt order and of sampling")
    resume: bool = Field(False, description="go on from the newest checkpoint of this run")
    rollout_samples: Count = Field(4, description="rollouts per step written to rollouts/, with their per-token KL")


class Recipe(Section):
    """One run of on-policy distillation."""

    run: RunConfig
    student: ModelConfig
    teacher: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    stop: StopConfig = KatConfig()
    objective: ObjectiveConfig = ReverseKlConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        rollout, train, evaluation = self.rollout, self.train, self.evaluation
        _check_stop(self.stop, rollout)
        if train.minibatches > rollout.prompts_per_step * rollout.samples_per_prompt:
            raise ValueError(
                f"train.minibatches {train.minibatches} exceeds the rollouts of a step (rollout.prompts_per_step "
                f"{rollout.prompts_per_step} x rollout.samples_per_prompt {rollout.samples_per_prompt}); lower it"
            )
        if evaluation.k is not None and evaluation.k > evaluation.samples:
            raise ValueError(
                f"evaluation.k {evaluation.k} exceeds evaluation.samples {evaluation.samples}; raise evaluation.samples"
            )
        return self


def _check_stop(stop: StopConfig, rollout: RolloutConfig) -> None:
    longest = rollout.max_new_tokens
    if isinstance(stop, KatConfig):
        _check_kat(stop, longest)
        if rollout.audit_fraction == 0 and stop.threshold.source == "audit":
            raise ValueError(
                "stop.threshold.source is 'audit' but rollout.audit_fraction is 0; raise rollout.audit_fraction"
            )
        if rollout.temperature == 0:
            raise ValueError("rollout.temperature is 0: the divergence of a greedy policy is undefined; set it above 0")
    if isinstance(stop, PrefixConfig) and stop.tokens > longest:
        raise ValueError(
            f"stop.tokens {stop.tokens} is longer than rollout.max_new_tokens {longest}; lower stop.tokens"
        )
    if isinstance(stop, RandomConfig) and stop.min_tokens > longest:
        raise ValueError(
            f"stop.min_tokens {stop.min_tokens} is longer than rollout.max_new_tokens {longest}; lower stop.min_tokens"
        )


def _check_kat(stop: KatConfig, longest: int) -> None:
    if stop.window > longest:
        raise ValueError(
            f"stop.window {stop.window} is longer than rollout.max_new_tokens {longest}; lower stop.window"
        )
    if stop.resolved_min_kept >= longest:
        raise ValueError(
            f"stop.min_kept {stop.resolved_min_kept} leaves nothing to cut below rollout.max_new_tokens {longest}; "
            "lower stop.min_kept"
        )
    if stop.resolved_stride > stop.window:
        raise ValueError(
            f"stop.stride {stop.resolved_stride} is longer than stop.window {stop.window}: tokens would go unseen; "
            "lower stop.stride"
        )
    if stop.threshold.min_entries > stop.threshold.capacity:
        raise ValueError(
            f"stop.threshold.min_entries {stop.threshold.min_entries} is never reached with stop.threshold.capacity "
            f"{stop.threshold.capacity}; raise stop.threshold.capacity"
        )
