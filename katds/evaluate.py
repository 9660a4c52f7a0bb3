"""An evaluation from its first check to its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from katds import __version__
from katds.assemble import make_evaluator, speaker
from katds.config import Recipe
from katds.core.collective import Collective
from katds.data.benchmarks import Benchmark, load_benchmarks
from katds.data.grading import Grader, make_grader
from katds.errors import ConfigError, Interrupted, unloadable
from katds.evaluation.evaluator import Evaluator, Samples
from katds.evaluation.metrics import Evaluation, evaluation_of
from katds.evaluation.report import results, table, write
from katds.evaluation.store import SampleFile
from katds.inputs import model_digest, prompts_digest
from katds.models.checks import ModelFacts, check_models
from katds.parallel.agree import on_main, same_everywhere, together, visible_everywhere
from katds.parallel.deepspeed_config import model_dtype, read_deepspeed_json, teacher_config
from katds.parallel.export import ModelSource, as_folder, find_model
from katds.parallel.offload import LentFolder, check_offload, uncheckable
from katds.parallel.shards import check_hpz
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen
from katds.schema import flat
from katds.signals import listening
from katds.train.clock import Clock
from katds.train.interruption import Interruption

_REFILLS = 4  # of every slot in a portion: at the end of a portion slots wait for the longest response, and a signal for the portion
_BEFORE = "came before anything was scored anew. The same command begins, or goes on."
_BETWEEN = "came during the evaluation. What has been scored is saved: the same command goes on."


def evaluate(recipe: Recipe) -> Evaluation:
    """Collective: scores the model at `student.path`, a Hugging Face folder or a run's checkpoint, on the recipe's benchmarks.

    Rank 0 writes RUN/evaluations/MODEL/: a file of samples per benchmark, results.json and results.md. Samples that are there are
    not made again; a model all of whose samples are there is not even loaded.

    Raises Interrupted if a signal ended it before: what has been scored is saved.
    """
    with listening():
        return _evaluate(recipe)


@dataclass(frozen=True, slots=True)
class _Inputs:
    student_json: dict[str, Any]
    source: ModelSource
    facts: ModelFacts
    tokenizer: Any
    benchmarks: list[Benchmark]
    grade: Grader


def _read_inputs(recipe: Recipe) -> _Inputs:
    """Reads and checks files; loads no weights. Raises ConfigError."""
    student_json = teacher_config(read_deepspeed_json(recipe.student.deepspeed, "student.deepspeed"))
    longest = recipe.evaluation.max_new_tokens or recipe.rollout.max_new_tokens
    source = find_model(recipe.student.path)
    facts = check_models(
        source.base, source.base, recipe.data.max_prompt_tokens, longest, end_tokens=recipe.rollout.end_tokens
    )
    tokenizer = AutoTokenizer.from_pretrained(source.base)
    benchmarks = load_benchmarks(recipe, tokenizer)
    if not benchmarks:
        raise ConfigError(
            "evaluation.data and evaluation.benchmarks are null: there is nothing to score. Name problems."
        )
    return _Inputs(student_json, source, facts, tokenizer, benchmarks, make_grader(recipe.evaluation.grader))


def _evaluate(recipe: Recipe) -> Evaluation:
    world = start_world(
        lost_after_seconds=recipe.run.lost_after_seconds,
        advice="Start it again on the hosts that are left: what has been scored is kept.",
    )
    collective = world.collective
    interruption = Interruption(collective)
    inputs = together(collective, lambda: _read_inputs(recipe))
    student_json, benchmarks = inputs.student_json, inputs.benchmarks
    problems = {f"problems of {b.label}": prompts_digest(b.prompts) for b in benchmarks}
    same_everywhere(collective, {**dict(flat(recipe.model_dump(mode="json"))), **problems})
    together(collective, lambda: _check_ranks(student_json, world.size), uncheckable)
    model = on_main(collective, lambda: as_folder(inputs.source))
    visible_everywhere(collective, model / "config.json", "student.path")
    settings = on_main(collective, lambda: _settings(recipe, student_json, model, inputs.facts.eos_ids))
    folder = recipe.run.folder / recipe.run.name / "evaluations" / _slug(recipe.student.path)
    files = {
        b.name: SampleFile(folder, b.label, {**settings, "name": b.name, "samples": b.samples}) for b in benchmarks
    }
    samples = on_main(collective, lambda: {b.name: files[b.name].read(b.prompts) for b in benchmarks})
    missing = {b.name: [i for i in range(len(b.prompts)) if i not in samples[b.name]] for b in benchmarks}
    if any(missing.values()):
        interruption.leave_if_asked(_BEFORE)
        lent = LentFolder(student_json, recipe.run.name, "evaluated", collective)
        student = together(
            collective, lambda: load_frozen(model, lent.config, inputs.facts.tokenizer_size),
            unloadable("student", model, recipe.student.deepspeed),
        )  # fmt: skip
        evaluator = make_evaluator(
            recipe,
            inputs.tokenizer,
            inputs.facts,
            benchmarks,
            inputs.grade,
            world,
            student,
            Clock(),
            speaker(world, print),
        )
        finished = _sample(
            evaluator, missing, samples, files, interruption.asked, partial(_portion, recipe, world.size), collective
        )
        lent.remove()
        if not finished:
            raise Interrupted(f"{interruption.name} {_BETWEEN}").everywhere()
    found = evaluation_of(samples, {b.name: b.k for b in benchmarks})
    on_main(collective, lambda: _conclude(folder, recipe.student.path, model, benchmarks, found, settings))
    return found


def _check_ranks(student_json: dict[str, Any], ranks: int) -> None:
    check_hpz(student_json, ranks, "student")
    check_offload(student_json, "student")


def _sample(
    evaluator: Evaluator, missing: Mapping[str, Sequence[int]], samples: dict[str, Samples], files: Mapping[str, SampleFile],
    asked: Callable[[], bool], portion: Callable[[Benchmark], int], collective: Collective,
) -> bool:  # fmt: skip
    """Collective: fills `samples` with what is missing, and saves it portion by portion; False if `asked` (collective) said between two
    that it is time to leave."""
    for benchmark in evaluator.benchmarks:
        for problems in _portions(missing[benchmark.name], portion(benchmark)):
            if asked():
                return False
            new = evaluator.sample({benchmark.name: problems})[benchmark.name]
            samples[benchmark.name] |= new
            on_main(collective, partial(_save, files[benchmark.name], benchmark, new, len(samples[benchmark.name])))
    return True


def _portion(recipe: Recipe, ranks: int, benchmark: Benchmark) -> int:
    """Problems of a portion."""
    return recipe.evaluation.portion or -(-_REFILLS * ranks * recipe.rollout.slots // benchmark.samples)


def _save(file: SampleFile, benchmark: Benchmark, new: Samples, done: int) -> None:
    file.append(new, {i: benchmark.prompts[i] for i in new})
    print(f"{benchmark.label}: {done} of {len(benchmark.prompts)} problems x {benchmark.samples} samples", flush=True)


def _portions(problems: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _settings(recipe: Recipe, student_json: dict[str, Any], model: Path, end_ids: Sequence[int]) -> dict[str, Any]:
    """What decides a sample, besides the problem and its benchmark's name and number of samples."""
    evaluation = recipe.evaluation
    # The digest reads no more than the beginning of the weights, where a model may be as it was before it was trained on.
    written = max((file.stat().st_mtime_ns for file in model.glob("*.safetensors")), default=0)
    return {
        "katds": __version__,
        "model": model_digest(model),
        "model_written": written,
        "dtype": str(model_dtype(student_json)),
        "end_ids": list(end_ids),
        "seed": recipe.run.seed,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "max_new_tokens": evaluation.max_new_tokens or recipe.rollout.max_new_tokens,
        "grader": evaluation.grader.model_dump(mode="json"),
    }


def _conclude(
    folder: Path, given: Path, model: Path, benchmarks: Sequence[Benchmark], found: Evaluation, settings: Mapping[str, Any]
) -> None:  # fmt: skip
    text = table(benchmarks, found)
    write(folder, results(given, model, benchmarks, found, settings), text)
    print(f"\n{model}\n\n{text}\n\nwritten to {folder / 'results.json'} and results.md", flush=True)


def _slug(path: Path) -> str:
    """A folder name that still says which model it is."""
    return "-".join(part for part in path.parts[-3:] if part not in ("/", ".", ".."))
