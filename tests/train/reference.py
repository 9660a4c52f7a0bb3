"""Scored rollouts made on the spot, and their update in plain PyTorch: one sequence at a time, whole vocabulary, no katds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from formulas import Moment, Tokens, step_losses
from transformers import AutoModelForCausalLM

from katds.core.collective import Collective
from katds.core.objectives import OBJECTIVES
from katds.core.types import LENGTH, Field, Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.models.attention import NAME
from katds.models.causal import FlatCausalLM
from katds.train.learner import Learner

VOCABULARY = 65  # tokens of zoo.tokenizer(); heads may be padded beyond
TOP_K = 8
TEMPERATURE = 0.7
# By how much log p has risen since a token was written: on both sides of both bounds of the clip, log 0.8 and log 1.28, and farther from
# them than a bf16 model errs.
MOVED = torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6], dtype=torch.float64)
OBJECTIVE_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "reverse_kl": ("reverse_kl", {"support": "student_top_k"}),
    "reverse_kl_of_teacher": ("reverse_kl", {"support": "teacher_top_k"}),
    "reverse_kl_full": ("reverse_kl", {"support": "full"}),
    "forward_kl": ("forward_kl", {"support": "teacher_top_k"}),
    "forward_kl_full": ("forward_kl", {"support": "full"}),
    "jsd": ("jsd", {"beta": 0.3}),
    "policy_gradient": ("policy_gradient", {}),
    "policy_gradient_clipped": ("policy_gradient", {"importance_weight": "clipped"}),
    "tropd": ("tropd", {}),
    "tropd_clip": ("tropd", {"outliers": "clip"}),
    "tropd_mask": ("tropd", {"outliers": "mask"}),
    "tropd_left_out": ("tropd", {"outliers": "leave_out"}),
    "tropd_as_written": ("tropd", {"reward_of": "written"}),
    "eopd": ("eopd", {}),
    "eopd_as_written": ("eopd", {"reward_of": "written"}),
    "eopd_weighted": ("eopd", {"forward_weight": 0.3}),
    "reopold_first": ("reopold", {"switch": 1.0}),
    "reopold_second": ("reopold", {"switch": 0.0}),
    "reopold_left_out": ("reopold", {"switch": 0.0, "below_floor": "mask"}),
    "iw_opd": ("iw_opd", {}),
    "iw_opd_as_written": ("iw_opd", {"reward_of": "written"}),
    "iw_opd_exclusive": ("iw_opd", {"share": "exclusive"}),
    "cross_tokenizer": ("cross_tokenizer", {}),
}
SAMPLED = tuple(OBJECTIVE_SETTINGS)[6:]  # whose loss is no divergence
PUBLISHED = SAMPLED[1:]  # whose formula is in tests/core/formulas.py
# What a teacher writes has tests of its own: tests/core/test_topd.py and whole runs.
_HERE = {kind for kind, objective in OBJECTIVES.items() if not objective.teacher_writes}
assert {kind for kind, _ in OBJECTIVE_SETTINGS.values()} == _HERE, "an objective is not tested"


def objective(name: str) -> Any:
    kind, settings = OBJECTIVE_SETTINGS[name]
    return OBJECTIVES[kind].from_settings(OBJECTIVES[kind].Settings(**settings))


def plain(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers gives it, but for norms in its own type: transformers' are in fp32 in an fp64 model too."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = MethodType(_norm, module)
    return model


def _norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@dataclass
class Scored:
    """A step's rollouts and, per rollout, the teacher's log-probabilities, hidden states, the student's top ids, and its
    log-probabilities and entropies when it wrote: it has moved since."""

    requests: list[RolloutRequest]
    rollouts: list[Rollout]
    student_ids: list[torch.Tensor]
    teacher: list[torch.Tensor]
    hidden: list[torch.Tensor]
    written: list[torch.Tensor]
    entropies: list[torch.Tensor]

    def batch(self, mine: Callable[[int], bool], needs: frozenset[Need], dtype: torch.dtype) -> RolloutBatch:
        """What the engine would hand to the rank that wrote the rollouts i with mine(i); any order of rollouts."""
        chosen = [i for i in range(len(self.rollouts)) if mine(i)][::-1]
        rows = [self._signal(i, needs, dtype) for i in chosen]
        return RolloutBatch(
            [self.rollouts[i] for i in chosen],
            {key: torch.cat([r[key] for r in rows]) for key in (rows[0] if rows else ())},
        )

    def chunks(self, i: int) -> list[tuple[int, float]]:
        """As if kept tokens of rollout i were chunks of text: see `Tokens.chunks`."""
        logprobs, at, found = self.teacher[i], 0, []
        actions = torch.tensor(self.rollouts[i].response_ids, dtype=torch.int64)
        said = logprobs.gather(-1, actions[:, None])[:, 0]
        for size in itertools.cycle((1, 2, -2, 3, -1)):
            if (count := min(abs(size), self.rollouts[i].kept - at)) == 0:
                return found
            found.append((count if size > 0 else -count, float(said[at : at + count].sum())))
            at += count
        raise AssertionError

    def _signal(self, i: int, needs: frozenset[Need], dtype: torch.dtype) -> dict[Field, torch.Tensor]:
        kept = self.rollouts[i].kept
        logprobs, ids = self.teacher[i][:kept], self.student_ids[i][:kept]
        actions = torch.tensor(self.rollouts[i].response_ids[:kept], dtype=torch.int64)
        top = logprobs.topk(TOP_K, -1)
        signal = {}
        wide = torch.promote_types(dtype, torch.float32)  # of scores, whatever the models' type
        if Need.SAMPLED in needs:
            signal[Field.SAMPLED] = logprobs.gather(-1, actions[:, None])[:, 0].to(wide)
        if Need.STUDENT_TOP_K in needs:
            signal |= {Field.STUDENT_TOP_IDS: ids.int(), Field.STUDENT_TOP: logprobs.gather(-1, ids).to(wide)}
        if Need.TEACHER_TOP_K in needs:
            signal |= {Field.TEACHER_TOP_IDS: top.indices.int(), Field.TEACHER_TOP: top.values.to(wide)}
        if Need.FULL in needs:
            signal[Field.HIDDEN] = self.hidden[i][:kept].to(dtype)
        if Need.ENTROPY in needs:
            signal[Field.ENTROPY] = -(logprobs.exp() * logprobs).sum(-1).to(wide)
        if Need.WRITTEN in needs:
            signal[Field.WRITTEN] = self.written[i][:kept].to(wide)
        if Need.STUDENT_ENTROPY in needs:
            signal[Field.STUDENT_ENTROPY] = self.entropies[i][:kept]
        if Need.CHUNKS in needs:
            chunks = self.chunks(i)
            sizes = torch.tensor([abs(size) for size, _ in chunks], dtype=torch.int64)
            own = [part.sum() for part in self.written[i][:kept].split(sizes.tolist())]
            signal[Field.CHUNK_STUDENT] = torch.tensor(own, dtype=torch.float64).repeat_interleave(sizes).to(wide)
            signal[Field.CHUNK_TEACHER] = (
                torch.tensor([said for _, said in chunks], dtype=torch.float64).repeat_interleave(sizes).to(wide)
            )
            taught = torch.tensor([size for size, _ in chunks], dtype=torch.int64).clamp(min=0)
            signal[Field.CHUNK_TOKENS] = taught.repeat_interleave(sizes).int()
        return signal


def scored(student: Any, teacher: Any, kept: list[int], seed: int = 0) -> Scored:
    """Random prompts and responses; `kept[i]` tokens of rollout i are learnt from, a few more were written."""
    draw = torch.Generator().manual_seed(seed)
    result = Scored([], [], [], [], [], [], [])
    for i, count in enumerate(kept):
        words = torch.randint(4, VOCABULARY, (1 + i % 5 + count + i % 3,), generator=draw).tolist()
        prompt, response = words[: 1 + i % 5], words[1 + i % 5 :]
        request = RolloutRequest(100 + i, Prompt(i, tuple(prompt)), 1000)
        result.requests.append(request)
        result.rollouts.append(Rollout(request, response, count, LENGTH))
        with torch.no_grad():
            logprobs, hidden = _responses(teacher, prompt, response)
            result.teacher.append(logprobs)
            result.hidden.append(hidden)
            own, _ = _responses(student, prompt, response)
        result.student_ids.append(own.topk(TOP_K, -1).indices)
        moved = MOVED[torch.randint(len(MOVED), (len(response),), generator=draw)]
        result.written.append(own.gather(-1, torch.tensor(response)[:, None])[:, 0] - moved)
        result.entropies.append(-(own.exp() * own).sum(-1).float())
    return result


def _responses(model: Any, prompt: list[int], response: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] and last hidden states [T, H] at the positions that predict the response."""
    out = model(torch.tensor([prompt + response]), output_hidden_states=True)
    rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.log_softmax(out.logits[0, rows, :VOCABULARY] / TEMPERATURE, -1), out.hidden_states[-1][0, rows]


class Reference(NamedTuple):
    """What an update has to be: gradient by parameter, mean loss, tokens learnt from."""

    gradient: dict[str, torch.Tensor]
    loss: float
    tokens: int


def _bucketed(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities at ids, and of all the rest."""
    top = logprobs.exp().gather(-1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


def _token_losses(
    name: str, p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor, actions: torch.Tensor
) -> torch.Tensor:
    """The published formulas, token by token; p and q are log-probabilities [T, V] of student and teacher."""
    if name == "reverse_kl_full":
        return (p.exp() * (p - q)).sum(-1)
    if name == "forward_kl_full":
        return (q.exp() * (q - p)).sum(-1)
    if name in ("reverse_kl", "reverse_kl_of_teacher"):
        ids = ids if name == "reverse_kl" else q.topk(TOP_K, -1).indices
        ps, qs = _bucketed(p, ids), _bucketed(q, ids)
        return (ps * (ps / qs).log()).sum(-1)
    if name == "forward_kl":
        ps, qs = (_bucketed(x, q.topk(TOP_K, -1).indices) for x in (p, q))
        return (qs * (qs / ps).log()).sum(-1)
    if name == "jsd":
        beta = OBJECTIVE_SETTINGS["jsd"][1]["beta"]
        mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
        return beta * (q.exp() * (q - mixture)).sum(-1) + (1 - beta) * (p.exp() * (p - mixture)).sum(-1)
    assert name == "policy_gradient"
    own, other = (x.gather(-1, actions[:, None])[:, 0] for x in (p, q))
    return -(other - own).detach() * own


def reference_gradient(name: str, student: Any, data: Scored, chosen: list[int]) -> Reference:
    """Autograd of (sum of token losses of the chosen rollouts) / (their learnt tokens)."""
    student.zero_grad()
    kind, settings = OBJECTIVE_SETTINGS[name]
    rollouts, ids, open_ = [], [], []
    for i in chosen:
        kept = data.rollouts[i].kept
        if kept == 0:
            continue
        request, response = data.requests[i], data.rollouts[i].response_ids[:kept]
        p, _ = _responses(student, list(request.prompt.token_ids), response)
        known = (data.written[i][:kept], data.entropies[i][:kept])
        rollouts.append(Tokens(request.id, p, data.teacher[i][:kept], torch.tensor(response), *known, data.chunks(i)))
        ids.append(data.student_ids[i][:kept])
        first, end = data.rollouts[i].hole or (0, 0)
        open_.append(torch.tensor([not first <= t < end for t in range(kept)]))
    if name not in PUBLISHED:
        step = [(_token_losses(name, r.p, r.q, top, r.actions), True) for r, top in zip(rollouts, ids, strict=True)]
    else:
        step = step_losses(kind, OBJECTIVES[kind].Settings(**settings), rollouts, Moment(0, 1, 0), TOP_K)
    losses = [loss[mask & learned] for (loss, learned), mask in zip(step, open_, strict=True)]
    total, tokens = torch.stack([loss.sum() for loss in losses]).sum(), sum(len(loss) for loss in losses)
    (total / tokens).backward()
    gradient = {key: value.grad.clone() for key, value in student.named_parameters()}
    return Reference(gradient, float(total.detach()) / tokens, tokens)


class PlainStudent:
    """The learner's `Student` without DeepSpeed: an unsharded model whose gradients are averaged over the ranks."""

    def __init__(self, plain: Any, collective: Collective, checkpointing: bool = False) -> None:
        model = copy.deepcopy(plain)
        model.set_attn_implementation(NAME)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = FlatCausalLM(model.train(), VOCABULARY)
        self.updates: list[dict[str, torch.Tensor]] = []
        self._collective = collective
        self._complete = False

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        assert not self._complete, "a micro-batch after the last one"
        loss.backward()
        self._complete = last
        if last:
            for parameter in self.model.parameters():
                parameter.grad = self._collective.sum(parameter.grad) / self._collective.size

    def step(self, lr: float) -> float:
        assert self._complete, "an update without a last micro-batch"
        self._complete = False
        self.updates.append({name: p.grad.clone() for name, p in self.model.model.named_parameters()})
        self.model.zero_grad()
        return float(torch.stack([g.norm() for g in self.updates[-1].values()]).norm())


class PlainTeacher:
    """The learner's `TeacherHead`."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._weight = model.get_output_embeddings().weight.detach()[:VOCABULARY].to(dtype)

    @contextmanager
    def head_weight(self) -> Iterator[tuple[torch.Tensor, None]]:
        yield self._weight, None


def learner(
    name: str, student: Any, teacher: Any, collective: Collective, budget: int, minibatches: int = 1, shards: Any = None
) -> Learner:
    return Learner(
        student, teacher, objective(name), collective, steps=1, seed=0, lr=lambda step: 0.0, temperature=TEMPERATURE,
        minibatches=minibatches, budget=budget, device=torch.device("cpu"), clock=lambda _: nullcontext(),
        shards=shards,
    )  # fmt: skip


def distance(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """|ours - reference| / |reference| over all parameters together."""
    assert ours.keys() == reference.keys()
    difference = torch.stack([(ours[name].double() - reference[name].double()).norm() for name in reference]).norm()
    return float(difference / torch.stack([g.double().norm() for g in reference.values()]).norm())
