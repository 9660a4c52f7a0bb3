"""`never` with the reverse KL of the whole vocabulary is plain on-policy distillation (DESIGN section 8.6)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_alone, run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import build_pair, deepspeed_json, optimizer

from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.stop.simple import NeverRule
from katds.core.types import Prompt
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen, load_student
from katds.rollout.engine import RolloutEngine
from katds.rollout.requests import requests_for
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.train.learner import Learner

STEPS, VOCABULARY = 3, 65
RATES = [1e-3, 2e-3, 1e-3]
SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
CLIP = 0.5


def prompts(step: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(step)
    return [Prompt(i, tuple(torch.randint(4, VOCABULARY, (1 + 2 * i,), generator=draw).tolist())) for i in range(4)]


def distil(root: Path, out: Path) -> list[Any]:
    """On a rank: three steps of katds; its rollouts as (prompt, response), by step, and what was reported."""
    world = start_world()
    student = load_student(
        root / "student", deepspeed_json(), VOCABULARY, optimizer(gradient_clip=CLIP, **SETTINGS), False
    )
    teacher = load_frozen(root / "teacher", deepspeed_json(), VOCABULARY)
    objective, clock = ReverseKl("full"), lambda _: nullcontext()
    settings = EngineSettings(2, 7, (1,), Sampling(), 0, 0, world.device)
    engine = RolloutEngine(student, [teacher.reading], NeverRule(), objective.needs, world.collective, settings, clock)
    learner = Learner(
        student, teacher, objective, world.collective, steps=STEPS, seed=0, lr=RATES.__getitem__, temperature=1.0, minibatches=1, budget=40,
        device=world.device, clock=clock,
    )  # fmt: skip
    steps = []
    for step in range(STEPS):
        requests = requests_for(prompts(step), samples=2, max_new_tokens=15, first_id=8 * step)
        batch = engine.generate(requests, step)
        report = learner.update(batch, requests, step)
        steps.append(([(r.request.prompt.token_ids, r.response_ids) for r in batch.rollouts], report))
    student.export(out, AutoTokenizer.from_pretrained(root / "student"))
    return steps


@pytest.mark.parametrize("size", [1, 2])
def test_steps_are_those_of_a_plain_pytorch_loop(tmp_path: Path, size: int) -> None:
    build_pair(tmp_path)
    compare(tmp_path, run_ranks(size, distil, tmp_path, tmp_path / "trained"), 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_single_device_does_the_steps_of_a_plain_loop_on_the_cpu(tmp_path: Path, device: str) -> None:
    """On CUDA in fp32: ZeRO-3 over NCCL, graphs, the kernels of the loss and of sampling."""
    build_pair(tmp_path)
    rank = run_alone(device, distil, tmp_path, tmp_path / "trained")
    compare(tmp_path, [rank], 1e-5 if device == "cpu" else 1e-4)


def compare(tmp_path: Path, ranks: list[Any], tolerance: float) -> None:
    """What the ranks did with their rollouts, against transformers and torch alone."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    adam = torch.optim.AdamW(student.parameters(), **SETTINGS)
    for step in range(STEPS):
        rollouts = [rollout for rank in ranks for rollout in rank[step][0]]
        assert len(rollouts) == 8
        losses = []
        for prompt, response in rollouts:
            ids, predicting = torch.tensor([[*prompt, *response]]), slice(len(prompt) - 1, -1)
            p = student(ids).logits[0, predicting].log_softmax(-1)
            with torch.no_grad():
                q = teacher(ids).logits[0, predicting].log_softmax(-1)
            losses.append((p.exp() * (p - q)).sum(-1))
        loss = torch.cat(losses).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        adam.param_groups[0]["lr"] = RATES[step]
        adam.step()
        for rank in ranks:
            report = rank[step][1]
            assert report["loss"] == pytest.approx(loss.item(), rel=tolerance)
            assert report["gradient_norm"] == pytest.approx(norm.item(), rel=10 * tolerance)
            assert (report["lr"], report["tokens"]) == (RATES[step], sum(len(r) for _, r in rollouts))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).state_dict()
    assert trained.keys() == before.keys()
    moved = max((trained[name] - before[name]).abs().max() for name in before)
    assert moved > 1e-3
    for name, value in student.state_dict().items():
        assert (trained[name] - value).abs().max() < 0.1 * tolerance, name
