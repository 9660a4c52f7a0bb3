"""The problems of an evaluation: one set of them, or several by name."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katds.config import Recipe
from katds.data.prompts import PromptSet, load_prompts
from katds.errors import ConfigError
from katds.sections import BenchmarkConfig, DataConfig

_ROOM = 1 << 24  # ids that a benchmark has to itself


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems that are sampled equally often. The only one of a recipe, `evaluation.data`, has the name ""."""

    name: str
    path: Path
    prompts: PromptSet
    samples: int  # per problem, n of avg@n
    k: int  # of pass@k

    @property
    def label(self) -> str:
        """The name, or that of the file where there is none."""
        return self.name or self.path.stem

    @property
    def first_id(self) -> int:
        """Of its rollouts: by the name, so that neither its place nor what else is evaluated decides how it is sampled."""
        return (1 + zlib.crc32(self.name.encode())) * _ROOM if self.name else 0


def load_benchmarks(recipe: Recipe, tokenizer: Any) -> list[Benchmark]:
    """The benchmarks of a recipe in its order; none where it names none.

    Raises ConfigError: unreadable data, or a problem without an answer, which would count as wrong.
    """
    every = recipe.evaluation.every_benchmark()
    return [_load(name, each, recipe.data, tokenizer) for name, each in every.items()]


def _load(name: str, benchmark: BenchmarkConfig, data: DataConfig, tokenizer: Any) -> Benchmark:
    section = f"evaluation.benchmarks.{name}" if name else "evaluation"
    given = {key: getattr(benchmark, key) for key in ("prompt_column", "prompt_suffix", "answer_column")}
    data = data.model_copy(update={key: value for key, value in given.items() if value is not None})
    if data.answer_column is None:
        raise ConfigError(
            f"{section}.data is given, but data.answer_column is null, so there is nothing to grade. Name the column with the answers."
        )
    prompts = load_prompts(
        benchmark.data, tokenizer, data, shuffle=False, limit=benchmark.limit, field=f"{section}.data",
        section=section if name else "data",
    )  # fmt: skip
    unanswered = [prompt.index + 1 for prompt in prompts if prompt.answer is None]
    if unanswered:
        raise ConfigError(
            f"{section}.data: row {unanswered[0]} of {benchmark.data} has no {data.answer_column!r} ({len(unanswered)} of "
            f"{len(prompts)} rows have none). Give each problem its answer or remove it."
        )
    assert benchmark.samples is not None and benchmark.k is not None, "every_benchmark fills them in"
    assert len(prompts) * benchmark.samples <= _ROOM, f"{benchmark.data} has too many problems"
    return Benchmark(name, benchmark.data, prompts, benchmark.samples, benchmark.k)
