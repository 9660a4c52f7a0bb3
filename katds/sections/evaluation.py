"""How the student is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from katds.settings import ByKind, Count, Nucleus, Positive, Scale, Section


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


GraderConfig = Annotated[
    MatchGraderConfig | MathGraderConfig, ByKind(lambda: {"match": MatchGraderConfig, "math": MathGraderConfig})
]


class BenchmarkConfig(Section):
    """One of several sets of problems. What is null is as in the sections data and evaluation."""

    data: Path = Field(description="its problems: a file or folder, like data.train")
    prompt_column: str | None = Field(None, description="default: data.prompt_column")
    prompt_suffix: str | None = Field(None, description="default: data.prompt_suffix")
    answer_column: str | None = Field(None, description="default: data.answer_column")
    samples: Positive | None = Field(None, description="default: evaluation.samples")
    k: Positive | None = Field(None, description="default: evaluation.k, or samples")
    limit: Positive | None = Field(None, description="default: evaluation.limit")


BenchmarkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class EvaluationConfig(Section):
    """Problems that the student solves before, during and after training."""

    data: Path | None = Field(
        None, description="evaluation prompts, same columns as the training data; null: no evaluation, or `benchmarks`"
    )
    benchmarks: dict[BenchmarkName, BenchmarkConfig | None] | None = Field(
        None,
        description="in place of data: several sets of problems by name, scored one by one and on average; null leaves one out",
    )
    samples: Positive = Field(8, description="rollouts per problem, n of avg@k and pass@k")
    k: Positive | None = Field(None, description="k of pass@k; default: samples")
    limit: Positive | None = Field(None, description="only the first so many problems")
    every: Count = Field(0, description="steps between evaluations; 0: before and after training only")
    portion: Positive | None = Field(
        None,
        description="problems after which launch/evaluate.py saves what it has, and leaves if it was asked to; ranks wait for each other's "
        "last response so often. null: as many as fill rollout.slots of all ranks four times",
    )
    max_new_tokens: Positive | None = Field(None, description="default: rollout.max_new_tokens")
    temperature: Scale = Field(1.0, description="0 decodes greedily")
    top_p: Nucleus = Field(0.95, description="nucleus sampling; 1 turns it off")
    grader: GraderConfig = MathGraderConfig()

    def every_benchmark(self) -> dict[str, BenchmarkConfig]:
        """Name -> benchmark, with its samples, k and limit filled in. `data` is a single benchmark without a name."""
        given = {"": BenchmarkConfig(data=self.data)} if self.data is not None else self.benchmarks or {}
        filled = {}
        for name, each in given.items():
            if each is not None:
                samples = each.samples or self.samples
                settled = {"samples": samples, "k": each.k or self.k or samples, "limit": each.limit or self.limit}
                filled[name] = each.model_copy(update=settled)
        return filled

    def headline(self) -> tuple[str, str]:
        """The names of the two metrics that one looks at first, avg@ and pass@: of several benchmarks the average's."""
        if self.benchmarks:
            return "average/avg@k", "average/pass@k"
        return f"avg@{self.samples}", f"pass@{self.k or self.samples}"

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.data is not None and self.benchmarks:
            raise ValueError(
                "evaluation.data and evaluation.benchmarks are both given; set one of them to null (data may be a benchmark of its own)"
            )
        if "average" in (self.benchmarks or {}):
            raise ValueError("evaluation.benchmarks.average has the name of the mean of all; give it another name")
        if self.k is not None and self.k > self.samples and not self.benchmarks:
            raise ValueError(
                f"evaluation.k {self.k} exceeds evaluation.samples {self.samples}; raise evaluation.samples"
            )
        for name, each in self.every_benchmark().items():
            assert each.k is not None and each.samples is not None
            if each.k > each.samples:
                place = f"evaluation.benchmarks.{name}"
                raise ValueError(f"{place}: k {each.k} exceeds samples {each.samples}; raise {place}.samples")
