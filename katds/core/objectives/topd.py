"""TOPD (arXiv 2606.00305): whether student and teacher really part shows in what each would write next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field as Setting

from katds.core.collective import Collective
from katds.core.divergences import top_k_tail_reverse_kl
from katds.core.objectives.aligned import aligned, gathered, student_entropy
from katds.core.objectives.apart import Place, highest_apart
from katds.core.objectives.base import Objective, ObjectiveSettings, Pen, Progress
from katds.core.objectives.rows import outside_holes
from katds.core.transport import Transport, compare
from katds.core.types import EOS, Field, Need, Rollout, RolloutBatch, Signal
from katds.settings import Positive, Rate, Scale, Share


class TopdSettings(ObjectiveSettings):
    """Reverse KL without surface mismatches, and the teacher's continuation as guidance where the two really part (arXiv 2606.00305)."""

    kind: Literal["topd"] = "topd"
    horizon: Positive = Setting(50, description="N: tokens of the near future of student and teacher that are compared")
    budget: Rate = Setting(
        0.76,
        description="tokens that the teacher reads and writes once more, per token of the rollouts: at the states of the highest loss, "
        "which lie a horizon apart, until this is spent. Not published; the default has the published cost",
    )
    surface: Share = Setting(
        0.3, description="share of these states, those of the nearest futures, that are surface mismatches"
    )
    surface_weight: Share = Setting(0.0, description="weight of a surface mismatch's own loss; not published")
    guidance: Scale = Setting(
        0.1,
        description="lambda: weight of the guidance at the other states; not published. 0: only surface mismatches count",
    )
    regularisation: Annotated[float, Setting(ge=0.05)] = Setting(
        0.1, description="of the transport's entropy, in units of its cost, by solver sinkhorn; not published"
    )
    embedding: Literal["input", "output"] = Setting(
        "input",
        description="which of the teacher's tables holds a token's vector: its input embeddings or its head; not published",
    )
    cost: Literal["cosine", "euclidean"] = Setting(
        "cosine",
        description="of moving a token to another, of their vectors: 1 - cosine, or the distance of the two unit vectors; not published",
    )
    solver: Literal["sinkhorn", "exact"] = Setting(
        "sinkhorn",
        description="entropic transport, on the device, or the exact one, pair by pair on the CPU, which moves each token to few; not "
        "published",
    )
    iterations: Annotated[int, Setting(ge=20)] = Setting(
        200,
        description="of solver sinkhorn; at the least regularisation, 0.05, 1% of the mass is then astray; not published",
    )

    def check(self, filtered: bool, minibatches: int, blended: bool = False) -> None:
        if find_spec("ot") is None:
            raise ValueError("objective.kind is topd, but POT is not installed; run: pip install 'katds[topd]'")
        if self.guidance == 0 and (self.surface_weight == 1 or self.surface == 0):
            raise ValueError(
                "objective.guidance is 0 and no surface mismatch weighs less than another token (objective.surface, surface_weight), so "
                "that the teacher would write for nothing; take objective.kind reverse_kl"
            )


@dataclass(frozen=True, slots=True)
class _State:
    """A token of this rank's from whose prefix both futures are compared; `row` is its own in the signal."""

    rollout: Rollout
    position: int
    row: int

    @property
    def place(self) -> Place:
        return Place(self.rollout.id, self.position)

    @property
    def prefix(self) -> tuple[int, ...]:
        rollout = self.rollout
        return (*rollout.request.prompt.token_ids, *rollout.prefix, *rollout.response_ids[: self.position])

    def future(self, horizon: int) -> list[int]:
        return self.rollout.response_ids[self.position : min(self.position + horizon, self.rollout.kept)]

    def room(self, horizon: int) -> int:
        return _room(self.rollout, self.position, horizon)


class Topd(Objective):
    """sum_t c_t KL(p_t || q_t) + lambda sum_i sum_j w_ij (-log p_i(y'_j)).

    In every step the states of the highest loss are looked at. The student's near future from a state t is what it has written,
    y_t .. y_{t+N-1}, a sample from that very prefix; the teacher's, y', it writes now. OT_t is the transport distance of the two (see
    `katds.core.transport`). The nearest futures are surface mismatches: the models say the same in other words, and c_t is
    `surface_weight`. At the others they really part: each following position i of the window is guided by the teacher's tokens j,
    w_ij = P_ij / sum_j P_ij along the transport plan P. Every other c_t is 1.

    The teacher's tokens are drawn as rollouts are: from q at rollout.temperature, filtered by top_p, top_k and min_p. Let q' be that.
    -log p(y'), y' drawn from q', is an unbiased sample of KL(q' || p) plus the entropy of q' where both read the same prefix: at the
    state itself, were all its weight on y'_0. Under a filter (top_p is 0.95 unless set) q' is not q, and the guidance draws p away from
    what the filter cuts off; top_p 1 guides towards q. It is not refused, as objectives are whose gradient is an expectation over the
    student's tokens: a teacher without its tail is still a teacher. Elsewhere the plan decides which of the teacher's tokens stand for
    what it would have said in place of the student's; there it is no estimate of a KL at one prefix.

    Open, and settings or chosen here:
    - KL(p || q) is on the student's top K and tail, the default of `reverse_kl`; a state's loss is the divergence of its token when the
      rollout was written, which the stop rule may want on the teacher's top K (`stop.support`).
    - How many states: as many as the budget pays, the highest losses first. Each costs its prefix, prompt included, and the tokens that the
      teacher is asked for. So rollouts of any length cost alike: where they are long, it reaches for few states, and for none if not
      even the first fits. 0.76 tokens per token of the rollouts are the published cost, 1.41, by operations of the parameters, for
      a student of 1.7B and a teacher of 8B; prefixes of 330 tokens then give 0.2% of the tokens as states, of 4000 tokens 0.02%.
    - A position's guidance is a mean over the teacher's tokens, w_ij sums to 1: how much of the plan's mass a position has is 1 / its
      window's length, which is no measure of its importance.
    - Windows of a rollout do not overlap, so that a position is guided from one state only.
    - Settings: the teacher's input embeddings or its head, 1 - cos or the distance of unit vectors, entropic or exact transport. The order
      in the text has no part in the cost of a token.
    - 30% is the share of surface mismatches among states, as it is published, not a bound of their distance, whose scale is the
      embedding's; their weight is 0.
    - lambda 0.1: a guided token's gradient by the logits is of order 1, that of the reverse KL of the order of its value, some tenths.
    - A window that the longest length or a rule's cut breaks off is compared with as many tokens of the teacher. Where the student has
      ended, the teacher writes on to the horizon, or to the end of the context.
    - Tokens in a hole of their rollout are no states, nor counted; nor is a token without loss a state.

    Memory: 8 N bytes per token of the step (GUIDE_IDS, GUIDE_WEIGHTS), beside the 8 K of its top K. Time beside the teacher's: see
    `highest_apart` and `compare`; one copy to the host.
    """

    Settings: ClassVar[type[ObjectiveSettings]] = TopdSettings
    needs = frozenset({Need.STUDENT_TOP_K})
    teacher_writes = True

    def __init__(
        self, horizon: int, budget: float, surface: float, surface_weight: float, guidance: float, transport: Transport,
        output: bool = False,
    ) -> None:  # fmt: skip
        self._horizon, self._budget, self._transport, self._output = horizon, budget, transport, output
        self._surface, self._surface_weight, self._guidance = surface, surface_weight, guidance
        self._metrics: dict[str, float] = {}

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(
            settings.horizon, settings.budget, settings.surface, settings.surface_weight, settings.guidance,
            Transport(settings.cost, settings.solver, settings.regularisation, settings.iterations),
            settings.embedding == "output",
        )  # fmt: skip

    def prepare(self, batch: RolloutBatch, progress: Progress, collective: Collective) -> dict[Field, torch.Tensor]:
        """Collective: WEIGHT [T], GUIDE_IDS and GUIDE_WEIGHTS [T, N], of weight 0 beyond the teacher's tokens and where no state
        guides. One sum, two gathers, and what the teacher's pen makes of `write` and `embed`, unless no rank has a state."""
        pen = progress.teacher
        assert pen is not None, "topd compares futures, but there is no teacher that writes"
        device = next(iter(batch.signal.values())).device if batch.signal else torch.device("cpu")
        count = sum(rollout.kept for rollout in batch.rollouts)
        fields = {
            Field.WEIGHT: torch.ones(count, device=device),
            Field.GUIDE_IDS: torch.zeros(count, self._horizon, dtype=torch.int32, device=device),
            Field.GUIDE_WEIGHTS: torch.zeros(count, self._horizon, device=device),
        }
        chosen = self._states(batch.rollouts, collective)
        if not chosen:
            return fields
        own = _own(batch.rollouts, chosen)
        theirs = pen.write([state.prefix for state in own], [state.room(self._horizon) for state in own])
        plan_SNN, distances = self._compare(own, theirs, pen, device)
        surface = self._nearest(own, theirs, distances, collective)
        for state, ids, plan_NN in zip(own, theirs, plan_SNN, strict=True):
            if state.place in surface:
                fields[Field.WEIGHT][state.row] = self._surface_weight
                continue
            length = len(state.future(self._horizon))
            rows = slice(state.row, state.row + length)
            fields[Field.GUIDE_IDS][rows, : len(ids)] = torch.tensor(ids, dtype=torch.int32, device=device)
            fields[Field.GUIDE_WEIGHTS][rows] = (plan_NN / plan_NN.sum(-1, keepdim=True))[:length].float()
        return fields

    def _states(self, rollouts: Sequence[Rollout], collective: Collective) -> list[Place]:
        """Collective: of all ranks, the same list on each. Begins the step's metrics."""
        open_T = outside_holes(rollouts)
        total = int(collective.sum(open_T.sum().reshape(1)))
        losses: dict[int, list[float]] = {}
        for rollout, learned in zip(rollouts, open_T.split([r.kept for r in rollouts]), strict=True):
            known = rollout.divergences[: rollout.kept]
            assert len(known) == rollout.kept, f"{len(known)} divergences for {rollout.kept} tokens of {rollout.id}"
            losses[rollout.id] = [d if is_open else 0.0 for d, is_open in zip(known, learned.tolist(), strict=True)]
        held = {rollout.id: rollout for rollout in rollouts}

        def cost(place: Place) -> int:
            rollout = held[place.rollout]
            before = len(rollout.request.prompt.token_ids) + len(rollout.prefix) + place.position
            return before + _room(rollout, place.position, self._horizon)

        chosen, spent = highest_apart(losses, self._horizon, cost, int(self._budget * total), collective)
        self._metrics = {"topd/states": float(len(chosen)), "topd/spent": spent / max(1, total)}
        return chosen

    def _compare(
        self, own: Sequence[_State], theirs: Sequence[Sequence[int]], pen: Pen, device: torch.device
    ) -> tuple[torch.Tensor, list[float]]:
        """Collective: the plan [S, N, N] and the distance of each of this rank's states."""
        ours = [state.future(self._horizon) for state in own]
        tokens = sorted({*chain.from_iterable(ours), *chain.from_iterable(theirs)})
        row = {token: i for i, token in enumerate(tokens)}
        embeddings_UH = pen.embed(torch.tensor(tokens, dtype=torch.int64, device=device), self._output)
        padded = [
            [[row[token] for token in window] + [0] * (self._horizon - len(window)) for window in side]
            for side in (ours, theirs)
        ]
        ours_SN, theirs_SN = torch.tensor(padded, dtype=torch.int64, device=device).view(2, len(own), self._horizon)
        lengths = [[len(a), len(b)] for a, b in zip(ours, theirs, strict=True)]
        lengths_S2 = torch.tensor(lengths, dtype=torch.int64, device=device).view(-1, 2)
        plan_SNN, distance_S = compare(embeddings_UH, ours_SN, theirs_SN, lengths_S2, self._transport)
        return plan_SNN, distance_S.tolist()

    def _nearest(
        self, own: Sequence[_State], theirs: Sequence[Sequence[int]], distances: list[float], collective: Collective
    ) -> set[Place]:
        """Collective: the surface mismatches of all ranks, and the step's metrics."""
        mine = [(d, state.place, len(ids)) for d, state, ids in zip(distances, own, theirs, strict=True)]
        everyone = sorted(chain.from_iterable(collective.gather(mine)))
        few = round(self._surface * len(everyone))
        self._metrics["topd/teacher_tokens"] = float(sum(tokens for *_, tokens in everyone))
        for name, part in (("surface", everyone[:few]), ("divergent", everyone[few:])):
            if part:
                self._metrics[f"topd/{name}_distance"] = math.fsum(distance for distance, *_ in part) / len(part)
        return {place for _, place, _ in everyone[:few]}

    def metrics(self) -> Mapping[str, float]:
        """Of the last step: `topd/states`, `topd/spent` of the budget, `topd/teacher_tokens` that were compared, and the mean distance
        [0 .. 2] of surface mismatches and of the others, `topd/surface_distance` and `topd/divergent_distance`."""
        return self._metrics

    def tile(self, logprobs_TV: torch.Tensor, actions_T: torch.Tensor, signal: Signal) -> dict[str, torch.Tensor]:
        """{"loss", "kl" (of all tokens, unweighted), "entropy" (of the student), "guidance" (its value [nats], without lambda), "guided"
        (tokens)}; see `Objective.tile`."""
        ids_TK = aligned(signal, Field.STUDENT_TOP_IDS, logprobs_TV)
        divergence_T = top_k_tail_reverse_kl(
            gathered(logprobs_TV, ids_TK), aligned(signal, Field.STUDENT_TOP, logprobs_TV)
        )
        guide_TN = aligned(signal, Field.GUIDE_WEIGHTS, logprobs_TV)
        guide_logprobs_TN = gathered(logprobs_TV, aligned(signal, Field.GUIDE_IDS, logprobs_TV))
        # 0 x -inf, of a token that nobody proposes, would be nan.
        guidance = -(guide_TN * guide_logprobs_TN.masked_fill(guide_TN == 0, 0.0)).sum()
        loss = (aligned(signal, Field.WEIGHT, logprobs_TV) * divergence_T).sum() + self._guidance * guidance
        return {
            "loss": loss,
            "kl": divergence_T.detach().sum(),
            "entropy": student_entropy(logprobs_TV),
            "guidance": guidance.detach(),
            "guided": (guide_TN > 0).any(-1).sum().to(logprobs_TV.dtype),
        }


def _room(rollout: Rollout, position: int, horizon: int) -> int:
    """As much of the teacher's future as the student had room for: where the student's was broken off, its length says nothing."""
    ended = rollout.reason == EOS and rollout.kept == len(rollout.response_ids)
    return horizon if ended else min(horizon, rollout.kept - position)


def _own(rollouts: Sequence[Rollout], chosen: Sequence[Place]) -> list[_State]:
    """Those of the chosen places that lie in these rollouts, in the order of rows."""
    positions: dict[int, list[int]] = {}
    for place in sorted(chosen):
        positions.setdefault(place.rollout, []).append(place.position)
    states, at = [], 0
    for rollout in rollouts:
        states += [_State(rollout, position, at + position) for position in positions.get(rollout.id, ())]
        at += rollout.kept
    return states
