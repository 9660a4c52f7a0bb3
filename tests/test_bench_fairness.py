"""The contest with TRL is between equals: both get the same prompts in every step, and learn the same from them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katds.bench import peers
from katds.bench.contest import Contest, Step, race
from katds.bench.ranks import on_ranks
from katds.bench.workloads import WORKLOADS, Workload, build

RANKS, STEPS = 2, 3


def sure_pair(workload: Workload, folder: Path, prompts: int) -> None:
    """A student that writes the last word of its prompt again and again, whatever is drawn, and a teacher that doubts it."""
    build(workload, folder, prompts)
    for role, scale in (("student", 100.0), ("teacher", 15.0)):
        model = AutoModelForCausalLM.from_pretrained(folder / role)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 1:] *= scale
        model.save_pretrained(folder / role)


def watched(contest: Contest) -> tuple[dict[str, list[Step]], dict[int, list[list[int]]], list[list[str]]]:
    """Collective: the race; the prompts of all ranks that katds writes to, by step; and those of this rank that TRL writes to."""
    from trl import DistillationTrainer

    from katds.rollout.requests import RequestStream

    ours: dict[int, list[list[int]]] = {}
    theirs: list[list[str]] = []
    step, generate = RequestStream.step, DistillationTrainer._generate

    def watched_step(self: RequestStream, number: int) -> Any:
        requests = step(self, number)
        prompts = [list(request.prompt.token_ids) for request in requests]
        assert ours.setdefault(number, prompts) == prompts, "the variants differ"
        return requests

    def watched_generate(self: Any, prompts: list[str]) -> Any:
        theirs.append(prompts)
        return generate(self, prompts)

    with (
        mock.patch.object(RequestStream, "step", watched_step),
        mock.patch.object(DistillationTrainer, "_generate", watched_generate),
    ):
        return race(contest), ours, theirs


@pytest.mark.slow
def test_both_learn_the_same_from_the_same_prompts(tmp_path: Path) -> None:
    parser, workload = argparse.ArgumentParser(), WORKLOADS["smoke"]
    peers.options(parser)
    options = parser.parse_args(["--steps", str(STEPS - 1), "--ranks", str(RANKS), "--gather", "once"])
    contest = peers._random(workload, options, tmp_path)
    a_step = workload.rollouts * RANKS
    sure_pair(workload, tmp_path, a_step * STEPS)
    found = on_ranks(RANKS, watched, replace(contest, workload=None))
    texts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    for step in range(STEPS):
        due = texts[step * a_step : (step + 1) * a_step]
        assert sorted(text for _, _, theirs in found for text in theirs[step]) == sorted(due)
        assert all(ours[step] == tokenizer(due)["input_ids"] for _, ours, _ in found)
    losses = {name: [step.loss for step in taken] for name, taken in found[0][0].items()}
    # Nothing is left to chance, and a step of learning moves the weights by a millionth: rounding in float32 remains.
    for name in contest.recipes:
        assert losses[name] == pytest.approx(losses["trl"], rel=1e-3), name
    # Other prompts would have shown.
    assert min(abs(a - b) for a, b in zip(losses["trl"], losses["trl"][1:], strict=False)) > 0.02 * losses["trl"][0]
