"""One update: packed forward, objective in vocabulary tiles, backward, optimizer step.

Invariants: the gradient is that of (sum of token losses over all ranks and micro-batches) / (kept tokens over all ranks), whatever
the number of ranks, the micro-batches and the order of packing. The teacher is not called: its signal came with the rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from katds.core.collective import Collective
from katds.core.objectives import Objective
from katds.core.objectives.base import Pen, Progress
from katds.core.objectives.rows import has_nan, outside_holes
from katds.core.packing import DEFAULT_ATTENTION_WEIGHT
from katds.core.types import Field, Need, RolloutBatch, RolloutRequest
from katds.errors import TrainingError
from katds.models.plans import PackedPlan, Shards, upload
from katds.models.tiled_head import tiled_loss
from katds.rollout.engine import PhaseClock
from katds.train.share import Share, deal, survey

Head = tuple[torch.Tensor, torch.Tensor | None]


class Student(Protocol):
    """What the learner needs of a training engine; see `katds.parallel.zero.ZeroStudent`."""

    def forward(self, **inputs: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, last: bool) -> None: ...
    def step(self, lr: float) -> float: ...


class TeacherHead(Protocol):
    def head_weight(self) -> AbstractContextManager[Head]: ...


class Learner:
    """Updates the student from scored rollouts.

    Args:
        teacher: asked for its head's weight only, and only by objectives over the full vocabulary.
        steps, seed: of the run, for objectives that change with it or draw random numbers.
        lr: optimizer step number -> learning rate.
        minibatches: optimizer steps per call; rollouts are dealt to them by place in the step.
        budget: tokens of a micro-batch on one rank.
        attention_weight: of the student; see `katds.core.packing`.
        pen: of a step, for objectives that let the teacher write.
        shards: the ranks that share each micro-batch, of as many times `budget`.
    """

    def __init__(
        self,
        student: Student,
        teacher: TeacherHead,
        objective: Objective,
        collective: Collective,
        *,
        steps: int,
        seed: int,
        lr: Callable[[int], float],
        temperature: float,
        minibatches: int,
        budget: int,
        device: torch.device,
        clock: PhaseClock,
        attention_weight: float = DEFAULT_ATTENTION_WEIGHT,
        pen: Callable[[int], Pen] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._student, self._teacher, self._objective, self._collective = student, teacher, objective, collective
        self._steps, self._seed = steps, seed
        self._lr, self._temperature, self._minibatches, self._budget = lr, temperature, minibatches, budget
        self._device, self._clock, self._attention_weight, self._pen = device, clock, attention_weight, pen
        self._shards = shards

    def update(self, batch: RolloutBatch, requests: list[RolloutRequest], step: int) -> dict[str, float]:
        """Collective: learns from one step's rollouts; returns means per learnt token over all ranks, learning rate, gradient norm."""
        with self._clock("prepare"):
            batch = self._prepared(batch, step)
        kept = survey(batch, requests, self._collective)
        totals: dict[str, float] = {}
        report = {"tokens": 0.0, "micro_batches": 0.0}
        needs_head = Need.FULL in self._objective.needs
        with self._teacher.head_weight() if needs_head else nullcontext() as head:
            for minibatch in range(self._minibatches):
                chosen = range(minibatch, len(requests), self._minibatches)
                with self._clock("pack"):
                    share = deal(
                        batch, requests, kept, chosen, self._budget, self._attention_weight, self._collective, self._device,
                        1 if self._shards is None else self._shards.size,
                    )  # fmt: skip
                if share.tokens == 0:
                    continue
                sums = self._learn(share, head)
                with self._clock("optimizer"):
                    report["lr"] = self._lr(step * self._minibatches + minibatch)
                    report["gradient_norm"] = _finite(self._student.step(report["lr"]), step)
                for key, value in sums.items():
                    totals[key] = totals.get(key, 0.0) + value
                report["tokens"] += share.tokens
                report["micro_batches"] += len(share.micro_batches)
                report["imbalance"] = share.imbalance
        means = {key: value / report["tokens"] for key, value in totals.items()}
        return {**report, **means, **self._objective.metrics()}

    def _prepared(self, batch: RolloutBatch, step: int) -> RolloutBatch:
        """Collective: with the fields that the objective makes, and without the holes of the rollouts."""
        pen = None if self._pen is None else self._pen(step)
        made = self._objective.prepare(batch, Progress(step, self._steps, self._seed, pen), self._collective)
        wrong = has_nan(batch, self._objective.needs)
        found = torch.tensor([any(rollout.hole for rollout in batch.rollouts), wrong], dtype=torch.int64)
        holes, missing = self._collective.max(found).tolist()
        if missing:
            raise TrainingError(
                f"A score of student or teacher in step {step + 1} is not a number. Look at the logits of both models, or lower "
                "train.optimizer.lr; run.resume goes on from the last checkpoint."
            ).everywhere()
        if holes:
            learned = outside_holes(batch.rollouts).to(self._device)
            made[Field.LEARNED] = learned & made[Field.LEARNED].to(self._device) if Field.LEARNED in made else learned
        # A rank that wrote nothing learns from the others which fields there are.
        return RolloutBatch(batch.rollouts, {**batch.signal, **made}) if batch.rollouts else batch

    def _learn(self, share: Share, head: Head | None) -> dict[str, float]:
        """Forward and backward of all micro-batches; returns the sums over all ranks."""
        scale = self._collective.size / share.tokens  # DeepSpeed averages gradients over ranks
        sums: dict[str, torch.Tensor] = {}
        for i, members in enumerate(share.micro_batches):
            with self._clock("forward"):
                loss, parts = self._forward(share, members, head)
            with self._clock("backward"):
                self._student.backward(loss * scale, last=i == len(share.micro_batches) - 1)
            for key, value in parts.items():
                sums[key] = sums[key] + value if key in sums else value
        keys = sorted(sums)
        total = self._collective.sum(torch.stack([sums[key].double() for key in keys]).cpu())
        return dict(zip(keys, total.tolist(), strict=True))

    def _forward(
        self, share: Share, members: list[int], head: Head | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of token losses of one micro-batch. Without members one dummy token keeps the gathers in step."""
        packed = self._pack(share, members)
        actions = share.actions[packed.acted]
        signal = {key: value[packed.judged] for key, value in share.signal.items()}

        teacher = None if head is None else (signal.pop(Field.HIDDEN), *head)

        def tile(logprobs: torch.Tensor, at: slice, *others: torch.Tensor) -> dict[str, torch.Tensor]:
            part: dict[Field, torch.Tensor] = {key: value[at] for key, value in signal.items()}
            if others:
                (part[Field.TEACHER_LOGPROBS],) = others
            return self._objective.tile(logprobs, actions[at], part)

        def objective(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
            return tiled_loss(hidden, weight, bias, self._temperature, tile, teacher=teacher)

        loss, sums = self._student.forward(
            input_ids=packed.inputs, position_ids=packed.positions, plan=packed.plan, rows=packed.rows, head=objective
        )
        return loss, {"loss": loss.detach(), **sums}

    def _pack(self, share: Share, members: list[int]) -> _Packed:
        """With `shards`: of this rank's stretch of the micro-batch."""
        none = torch.empty(0, dtype=torch.int64)
        prompts, lengths, rows, acted, judged, at = [], [], [none], [none], [none], 0
        for i in members:
            prompt, span, own, place = share.requests[i].prompt.token_ids, share.spans[i], share.own[i], share.places[i]
            count, before = span.stop - span.start, len(prompt) + len(share.leads.get(i, ()))
            prompts.append(torch.tensor(prompt))
            read = torch.arange(len(own)) if share.learned is None else share.learned[place].nonzero().squeeze(-1)
            rows.append(read + (at + before - 1 + own.start))
            acted.append(read + (span.start + own.start))
            judged.append(read + place.start)
            lengths.append(before + count - 1)
            at += lengths[-1]
        if not members:
            prompts, lengths = [torch.zeros(1, dtype=torch.int64)], [1]
        if self._shards is not None and (missing := -sum(lengths) % self._shards.size):
            prompts.append(torch.zeros(missing, dtype=torch.int64))  # stretches are equally long
            lengths.append(missing)
        # One transfer for all that comes from the host.
        positions = torch.cat([torch.arange(n) for n in lengths])
        part = _stretch(self._shards, sum(lengths))
        host = [torch.cat(prompts), positions[part], torch.cat(rows) - part.start, torch.cat(acted), torch.cat(judged)]
        read, *others = upload(torch.cat(host), self._device).split([len(part) for part in host])
        pieces = list(read.split([len(prompt) for prompt in prompts]))
        for at, i in enumerate(members):
            lead = [share.leads[i]] if i in share.leads else []
            pieces[at] = torch.cat([pieces[at], *lead, share.actions[share.spans[i]][:-1]])  # the last is never read
        plan = PackedPlan.of(lengths, self._device, self._shards)
        return _Packed(torch.cat(pieces)[part], plan, *others)


class _Packed(NamedTuple):
    """A micro-batch as it is fed to the student, flat."""

    inputs: torch.Tensor
    plan: PackedPlan
    positions: torch.Tensor
    rows: torch.Tensor  # the inputs that predict tokens that are learnt from
    acted: torch.Tensor  # where these tokens are in the share's actions
    judged: torch.Tensor  # and in its signal


def _stretch(shards: Shards | None, tokens: int) -> slice:
    """This rank's part of so many inputs."""
    if shards is None:
        return slice(0, tokens)
    length = tokens // shards.size
    return slice(shards.rank * length, (shards.rank + 1) * length)


def _finite(norm: float, step: int) -> float:
    """`norm`, of all ranks. DeepSpeed passes over an update whose gradient is not finite; a run that does so without a word has stopped
    learning."""
    if not math.isfinite(norm):
        raise TrainingError(
            f"The gradient norm of step {step + 1} is {norm}. Look at the logits of both models, or lower train.optimizer.lr; "
            "run.resume goes on from the last checkpoint."
        ).everywhere()
    return norm
