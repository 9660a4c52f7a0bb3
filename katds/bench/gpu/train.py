"""Training: forward and backward of one packed micro-batch with the default objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.counts import training_flops
from katds.bench.gpu.machine import TOP_K, Bench, Case, Shape, multiplied, students
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.types import Field
from katds.models.causal import FlatCausalLM
from katds.models.plans import PackedPlan
from katds.models.tiled_head import tiled_loss


def cases(bench: Bench) -> Iterator[Case]:
    for name, shape in students(bench).items():
        model = bench.model(shape)
        model.train()
        for recompute in (False, True):  # in this order: it is not switched off again
            title = f"{name}, {'recomputed' if recompute else 'kept'} activations"
            yield title, partial(_train, bench, model, shape, recompute)
        del model


def _train(bench: Bench, model: FlatCausalLM, shape: Shape, recompute: bool) -> dict[str, Any]:
    tokens, lengths = (64, [24, 40]) if bench.toy else (16384, [512, 1024, 2048, 512, 4096, 1024, 3072, 4096])
    assert sum(lengths) == tokens
    if recompute:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = bench.tokens(tokens, below=shape.vocabulary)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(bench.device)
    tile = student_top_k(bench, shape, tokens)

    def step() -> None:
        plan = PackedPlan.of(lengths, bench.device)

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
            return tiled_loss(hidden, weight, bias, 1.0, tile)[0]

        (model(ids, positions, plan, head) / tokens).backward()
        model.zero_grad(set_to_none=True)

    memory = bench.whole_gib(step)
    return {**bench.timed(step, tokens, training_flops(multiplied(model), tokens)), "GiB": memory}


def student_top_k(bench: Bench, shape: Shape, tokens: int) -> Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]:
    """The default objective on made-up teacher scores."""
    top_k = min(TOP_K, shape.vocabulary - 1)
    ids = torch.arange(top_k, device=bench.device).expand(tokens, -1).int()
    scores = (torch.randn(tokens, top_k, device=bench.device)).log_softmax(-1) - 0.1
    actions = torch.zeros(tokens, dtype=torch.int64, device=bench.device)
    objective = ReverseKl("student_top_k")

    def tile(logprobs: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
        signal = {Field.STUDENT_TOP_IDS: ids[at], Field.STUDENT_TOP: scores[at]}
        return objective.tile(logprobs, actions[at], signal)

    return tile
