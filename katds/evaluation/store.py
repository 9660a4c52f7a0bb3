"""Graded samples on disk, a line per problem, so that an evaluation that broke off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from katds.core.types import Prompt
from katds.evaluation.evaluator import Samples
from katds.evaluation.metrics import Sample
from katds.files import append_text


class SampleFile:
    """The samples of one benchmark: `folder`/NAME-DIGEST.jsonl, its first line the identity that the digest is of.

    Args:
        identity: all that decides a sample besides the problem: model, sampling, grader. Another identity is another file, so that
            nothing is mixed and nothing is lost. JSON-compatible.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        self._identity = dict(identity)
        self.path = folder / f"{name}-{_digest(self._identity)}.jsonl"

    def read(self, prompts: Iterable[Prompt]) -> Samples:
        """Of these problems, those that are done. One that has changed since is not; a line torn by a kill is as if it was not there."""
        if not self.path.exists():
            return {}
        lines = [_parsed(line) for line in self.path.read_text().splitlines()]
        known = {(line["problem"], line["prompt"]): line["samples"] for line in lines if "problem" in line}
        found = {i: known.get((i, _prompt_digest(prompt))) for i, prompt in enumerate(prompts)}
        return {i: [Sample(*sample) for sample in samples] for i, samples in found.items() if samples is not None}

    def append(self, samples: Samples, prompts: Mapping[int, Prompt]) -> None:
        """Adds the samples of these problems."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        torn = not fresh and not self.path.read_bytes().endswith(b"\n")
        lines: list[dict[str, Any]] = [{"identity": self._identity}] if fresh else []
        lines += [
            {"problem": i, "prompt": _prompt_digest(prompts[i]), "samples": [astuple(sample) for sample in each]}
            for i, each in samples.items()
        ]
        append_text(self.path, "\n" * torn + "".join(json.dumps(line) + "\n" for line in lines))


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _prompt_digest(prompt: Prompt) -> str:
    return _digest([list(prompt.token_ids), prompt.answer])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
