"""Who computes the loss and its gradients: katds, plain autograd, liger-kernel; and whether they compute the same."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from katds.bench.arguments import positive

if TYPE_CHECKING:
    import torch

TOP = 64
# Greatest relative difference (Frobenius norm) of a loss or gradient from katds', in units of the type's epsilon. Both are
# sums over the vocabulary of differences of logarithms near 10. In float32 all round those, to about 10 epsilon; in
# bfloat16 only liger-kernel does, and as errors are independent 8 epsilon remain of 10.
TOLERANCE = {"float32": 32, "bfloat16": 8}
Run = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class Case:
    """One shape; `tied`: the head's weight is also the embedding that the hidden states begin with."""

    vocabulary: int
    hidden: int
    tokens: int
    dtype: str
    head: str

    @classmethod
    def parse(cls, text: str) -> Case:
        fields = text.split(",")
        if len(fields) != 5 or fields[3] not in TOLERANCE or fields[4] not in ("tied", "untied"):
            raise argparse.ArgumentTypeError(f"{text!r} is not V,H,T,float32|bfloat16,tied|untied")
        vocabulary, hidden, tokens = map(positive, fields[:3])
        if vocabulary <= TOP:
            raise argparse.ArgumentTypeError(f"{text!r}: the vocabulary has to be larger than the top {TOP}")
        return cls(vocabulary, hidden, tokens, *fields[3:])


class Inputs(NamedTuple):
    """Leaves `base` [T, H] and `weight` [V, H]; the teacher's hidden states and head; its scores at the student's top."""

    base: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor | None  # [T] what the embedding of a tied head is read at
    teacher: tuple[torch.Tensor, torch.Tensor, None]
    top_ids: torch.Tensor  # [T, 64]
    top: torch.Tensor  # [T, 64]

    def hidden(self) -> torch.Tensor:
        import torch

        return self.base if self.tokens is None else self.base + torch.nn.functional.embedding(self.tokens, self.weight)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normally distributed; logits of standard deviation 1.5, so that neither model is sure nor uniform."""
    import torch

    from katds.models.tiled_head import score_head

    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, scale: float) -> torch.Tensor:
        drawn = torch.randn(rows, case.hidden, generator=generator).mul_(scale)
        return drawn.to(device, getattr(torch, case.dtype))

    scale = 1.5 / case.hidden**0.5
    base, weight = draw(case.tokens, 1.0).requires_grad_(), draw(case.vocabulary, scale).requires_grad_()
    teacher = (draw(case.tokens, 1.0), draw(case.vocabulary, scale), None)
    tokens = torch.randint(case.vocabulary, (case.tokens,), generator=generator).to(device)
    inputs = Inputs(base, weight, tokens if case.head == "tied" else None, teacher, tokens, tokens)
    top = min(TOP, case.vocabulary)
    hidden = inputs.hidden().detach()
    ids = score_head(hidden, weight, None, 1.0, lambda p, rows: {"ids": p.topk(top, -1).indices.int()})["ids"]
    scores = score_head(*teacher, 1.0, lambda q, rows: {"top": q.gather(-1, ids[rows].long())})["top"]
    return inputs._replace(top_ids=ids, top=scores)


def contenders(inputs: Inputs, support: str, liger_chunk: int) -> dict[str, Run]:
    """Each leaves gradients in `inputs` and returns the loss."""
    losses = {"katds": _katds(inputs, support), "plain": _plain(inputs, support)}
    if support == "full" and find_spec("liger_kernel"):
        losses["liger"] = _liger(inputs, liger_chunk)

    def with_gradients(make_loss: Run) -> Run:
        def run() -> torch.Tensor:
            inputs.base.grad = inputs.weight.grad = None
            loss = make_loss()
            loss.backward()
            return loss.detach()

        return run

    return {name: with_gradients(make_loss) for name, make_loss in losses.items()}


def _katds(inputs: Inputs, support: str) -> Run:
    from katds.core.objectives.reverse_kl import ReverseKl
    from katds.core.types import Field
    from katds.models.tiled_head import tiled_loss

    objective = ReverseKl("full" if support == "full" else "student_top_k")

    def tile(logprobs: torch.Tensor, at: slice, teacher: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        signal = {Field.STUDENT_TOP_IDS: inputs.top_ids[at], Field.STUDENT_TOP: inputs.top[at]}
        if teacher is not None:
            signal = {Field.TEACHER_LOGPROBS: teacher}
        return objective.tile(logprobs, inputs.top_ids[at, 0], signal)

    teacher = inputs.teacher if support == "full" else None

    def loss() -> torch.Tensor:
        return tiled_loss(inputs.hidden(), inputs.weight, None, 1.0, tile, teacher=teacher)[0] / len(inputs.base)

    return loss


def _plain(inputs: Inputs, support: str) -> Run:
    """[T, V] logits, log_softmax in float32, autograd: what trainers without a fused loss do."""
    import torch
    from torch.nn.functional import kl_div, linear

    def full(p: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            q = linear(*inputs.teacher).float().log_softmax(-1)
        return kl_div(q, p, reduction="sum", log_target=True)

    def with_tail(top: torch.Tensor) -> torch.Tensor:
        return torch.cat([top, torch.log(-torch.expm1(top.logsumexp(-1, keepdim=True)))], -1)

    def top_k(p: torch.Tensor) -> torch.Tensor:
        p_top, q_top = with_tail(p.gather(-1, inputs.top_ids.long())), with_tail(inputs.top)
        return (p_top.exp() * (p_top - q_top)).sum()

    divergence = full if support == "full" else top_k

    def loss() -> torch.Tensor:
        return divergence(linear(inputs.hidden(), inputs.weight).float().log_softmax(-1)) / len(inputs.base)

    return loss


def _liger(inputs: Inputs, chunk: int) -> Run:
    """Its JSD of beta 1 is reverse KL by definition, as in `katds.core.divergences.generalised_jsd`."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Not compiled: it would need a compiler here, and katds is not compiled either.
    fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, chunk_size=chunk)
    labels = torch.zeros(len(inputs.base), dtype=torch.int64, device=inputs.base.device)

    def loss() -> torch.Tensor:
        # It writes its chunks' gradients, so that it takes leaves and others alike.
        made: torch.Tensor = fused(inputs.hidden(), inputs.weight, *inputs.teacher[:2], labels)
        return made

    return loss


def disagreement(runs: dict[str, Run], inputs: Inputs, dtype: str) -> float:
    """The greatest relative difference from katds of any loss or gradient.

    Raises:
        RuntimeError: it is above the tolerance: the contenders do not compute the same.
    """
    import torch

    def outcome(run: Run) -> list[torch.Tensor]:
        loss = run()
        return [loss, *(leaf.grad.clone() for leaf in (inputs.base, inputs.weight) if leaf.grad is not None)]

    worst, allowed = 0.0, TOLERANCE[dtype] * torch.finfo(getattr(torch, dtype)).eps
    ours = outcome(runs["katds"])
    for name in runs.keys() - {"katds"}:
        for what, a, b in zip(("loss", "hidden", "weight"), ours, outcome(runs[name]), strict=True):
            apart = float(torch.dist(a.float(), b.float()) / a.float().norm())
            # Not `apart > allowed`, which is false for nan.
            if not apart <= allowed:
                raise RuntimeError(
                    f"katds and {name} differ in {what} by {apart:.2g} of its norm, {allowed:.2g} is allowed"
                )
            worst = max(worst, apart)
    return worst
