"""Training: forward and backward of one packed micro-batch with the default objective."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.loss import student_top_k
from katds.bench.gpu.machine import Bench, Case, Shape, multiplied, students
from katds.models.attention import PackedPlan
from katds.models.causal import FlatCausalLM
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

    held = bench.held_gib()
    peak = bench.peak_gib(step)
    s = bench.seconds(step)
    memory = None if peak is None else held + peak
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(6 * multiplied(model) * tokens, s), "GiB": memory}
