"""Lengths of rollouts and prompts, from where they are recorded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from katds.config import Recipe
from katds.core import lengths
from katds.core.types import EOS, LENGTH
from katds.data.prompts import load_prompts
from katds.errors import ConfigError
from katds.plan.lengths import Lengths, Prompts


def scenarios(run: Path, natural: Path | None) -> dict[str, Lengths]:
    """What the rollouts of a run would be with its stop rule, and without; by name, the run's own first.

    Args:
        natural: a run that no rule ended; None: what the audit rollouts of `run` say.

    Raises ConfigError.
    """
    ruled, ended = _written(run, "--lengths")
    if natural is None and not ended:
        return {"as recorded": ruled}
    free = _audit(run) if natural is None else _natural(natural)
    whole = replace(ruled, source=f"{ruled.source}; its audit group as without the rule", audit=free.written)
    return {"with the rule": whole, "without": free}


def _written(folder: Path, flag: str) -> tuple[Lengths, bool]:
    """Rollouts outside the audit group, all steps of a run together; whether a rule ended any."""
    try:
        steps = lengths.read(folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace("stop.run", flag, 1)) from None
    every = [length for step in steps for length in step.lengths]
    kept = [length for step in steps for length in step.kept]
    ended = any(reason not in (EOS, LENGTH) for step in steps for reason in step.reasons)
    return Lengths(every, kept, f"{len(every)} rollouts of {folder}, all steps together"), ended


def _natural(folder: Path) -> Lengths:
    found, ended = _written(folder, "--natural")
    if ended:
        raise ConfigError(
            f"--natural: a rule has ended rollouts of {folder}. Give the folder of a run with stop.kind never."
        )
    return found


def _audit(folder: Path) -> Lengths:
    """Rollouts of the audit group, as far as the run has saved samples of them (`run.rollout_samples`)."""
    found: list[int] = []
    for file in sorted((folder / "rollouts").glob("step-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the last one of a run that was killed may be torn
                row = json.loads(line)
                found += [row["tokens"]] if row["audit"] else []
    if not found:
        raise ConfigError(
            f"--lengths: {folder}/rollouts holds no rollout of the audit group, so it is unknown how long rollouts are without the rule. "
            "Give --natural the folder of a run with stop.kind never."
        )
    return Lengths(found, found, f"{len(found)} audit rollouts that {folder} has saved")


def prompts(recipe: Recipe) -> Prompts:
    """Of the recipe's data; where the file is not here, as long as data.max_prompt_tokens allows. Raises ConfigError."""
    limit = recipe.data.max_prompt_tokens
    if not recipe.data.train.exists():
        return Prompts(
            limit, limit, f"{recipe.data.train} is not here; prompts are taken to have data.max_prompt_tokens, {limit}"
        )
    tokenizer = _tokenizer("student", recipe.student.path)
    found = load_prompts(recipe.data.train, tokenizer, recipe.data, teachers=list(recipe.teachers))
    sizes = [len(prompt.token_ids) for prompt in found]
    source = f"{len(sizes)} prompts of {recipe.data.train}"
    if not recipe.objective.aligns_text:
        return Prompts(max(sizes), statistics.fmean(sizes), source)
    reading = _reading(
        recipe, [tokenizer.decode(prompt.token_ids, skip_special_tokens=True) for prompt in found], tokenizer
    )
    return Prompts(
        max(sizes),
        statistics.fmean(sizes),
        f"{source}; {reading:.2f} tokens of the teacher for one of the student",
        reading,
    )


def _tokenizer(section: str, path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception:  # transformers raises many kinds
        raise ConfigError(
            f"{section}.path is {path}, whose tokenizer cannot be read to count the tokens of data.train. Add its files."
        ) from None


def _reading(recipe: Recipe, texts: Sequence[str], student: Any) -> float:
    """Tokens of the teacher for one of the student. Responses are taken to be such texts as the prompts are."""
    teacher = _tokenizer("teacher", recipe.teacher.path)
    counts = [
        sum(len(ids) for ids in each(list(texts), add_special_tokens=False)["input_ids"]) for each in (teacher, student)
    ]
    return counts[0] / max(1, counts[1])
