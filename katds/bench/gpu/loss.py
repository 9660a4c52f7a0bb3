"""The loss by itself, from hidden states to gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from katds.bench.gpu.machine import TOP_K, Bench, Case, Shape, students, teacher_shape
from katds.core.divergences import reverse_kl
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.types import Field
from katds.models.tiled_head import head_logprobs, tiled_loss


def cases(bench: Bench) -> Iterator[Case]:
    shape = next(iter(students(bench).values()))
    _, guide = teacher_shape(bench)
    tokens = 48 if bench.toy else 8192
    for name in ("top K, tiles", "full, tiles", "full, whole logits"):
        yield f"{tokens} tokens x {shape.vocabulary}, {name}", partial(_loss, bench, shape, guide, tokens, name)


def _loss(bench: Bench, shape: Shape, guide: Shape, tokens: int, name: str) -> dict[str, Any]:
    """Forward and backward from hidden states; `whole logits` is what one writes without tiles."""

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, device=bench.device) / size[-1] ** 0.5).to(bench.dtype)

    hidden, weight = (random(n, shape.hidden).requires_grad_() for n in (tokens, shape.vocabulary))
    teacher_hidden, teacher_weight = (random(n, guide.hidden) for n in (tokens, guide.vocabulary))
    objective, actions = ReverseKl("full"), torch.zeros(tokens, dtype=torch.int64, device=bench.device)

    def full(logprobs: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            scores = head_logprobs(teacher_hidden[at], teacher_weight, None, 1.0)
        return objective.tile(logprobs, actions[at], {Field.TEACHER_LOGPROBS: scores})

    def whole() -> torch.Tensor:
        with torch.no_grad():
            scores = head_logprobs(teacher_hidden, teacher_weight, None, 1.0)
        return reverse_kl(head_logprobs(hidden, weight, None, 1.0), scores).sum()

    tile = student_top_k(bench, shape, tokens) if name == "top K, tiles" else full

    def step() -> None:
        value = whole() if name == "full, whole logits" else tiled_loss(hidden, weight, None, 1.0, tile)[0]
        (value / tokens).backward()
        hidden.grad = weight.grad = None

    peak = bench.peak_gib(step)
    s = bench.seconds(step)
    flops = 6 * tokens * shape.vocabulary * shape.hidden
    flops += 0 if name == "top K, tiles" else 2 * tokens * guide.vocabulary * guide.hidden
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(flops, s), "GiB": peak}


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
