"""The objectives on sampled tokens as their papers write them: rollout by rollout, over the whole vocabulary, in plain float64.

Nothing of katds but its scalar random numbers, which name a draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from katds.core.counter import key, uniform

KINDS = ("policy_gradient-clipped", "tropd", "eopd", "reopold", "iw_opd", "cross_tokenizer")


class Tokens(NamedTuple):
    """One rollout. log-probabilities of student and teacher [T, V], and what was known when it was written, [T] each."""

    id: int
    p: torch.Tensor
    q: torch.Tensor
    actions: torch.Tensor
    written: torch.Tensor
    entropies: torch.Tensor  # float32
    chunks: Sequence[
        tuple[int, float]
    ] = ()  # of text: student tokens (negative: teaches nothing), the teacher's log-likelihood


class Moment(NamedTuple):
    step: int
    steps: int
    seed: int


Losses = list[tuple[torch.Tensor, torch.Tensor]]  # of each rollout's tokens, and which of them are learnt from


def step_losses(kind: str, settings: Any, rollouts: Sequence[Tokens], now: Moment, top_k: int) -> Losses:
    """The losses of a step; `top_k`: tokens of the teacher that a forward KL is made on."""
    if kind == "cross_tokenizer":
        return [_cross_tokenizer(settings, r) for r in rollouts]
    if kind == "reopold":
        return _reopold(settings, rollouts, now)
    one = {"policy_gradient": _policy_gradient, "tropd": _tropd, "eopd": _eopd, "iw_opd": _iw_opd}[kind]
    everyone = [torch.ones(len(r.actions), dtype=torch.bool) for r in rollouts]
    if kind == "tropd" and settings.outliers == "leave_out":
        everyone = [trusted(r, now) for r in rollouts]
    return [(one(settings, r, now, top_k), learned) for r, learned in zip(rollouts, everyone, strict=True)]


def _at(logprobs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return logprobs[torch.arange(len(actions)), actions]


def _ppo(r: Tokens, advantage: torch.Tensor, settings: Any) -> torch.Tensor:
    """A gain counts up to the upper bound of the ratio, a loss down to the lower one."""
    ratio = torch.exp(_at(r.p, r.actions) - r.written)
    bounded = torch.where(
        advantage >= 0, ratio.clamp(max=1 + settings.clip_high), ratio.clamp(min=1 - settings.clip_low)
    )
    return -advantage.detach() * bounded


def _reward(r: Tokens, settings: Any) -> torch.Tensor:
    """p: of now, where the settings do not say that it is of then."""
    now = getattr(settings, "reward_of", "present") == "present"
    return (_at(r.q, r.actions) - (_at(r.p, r.actions) if now else r.written)).detach()


def _as_written(r: Tokens) -> torch.Tensor:
    return _at(r.q, r.actions) - r.written


def _forward_kl(r: Tokens, top_k: int) -> torch.Tensor:
    ids = r.q.argsort(-1, descending=True)[:, :top_k]
    q, p = (x.exp().gather(-1, ids) for x in (r.q, r.p))
    q_rest, p_rest = 1 - q.sum(-1), 1 - p.sum(-1)
    return (q * (q / p).log()).sum(-1) + q_rest * (q_rest / p_rest).log()


def _policy_gradient(settings: Any, r: Tokens, now: Moment, top_k: int) -> torch.Tensor:
    return _ppo(r, _reward(r, settings), settings)


def trusted(r: Tokens, now: Moment) -> torch.Tensor:
    name = key(now.seed, now.step, r.id, 1)
    odds = [min(math.exp(x), 1.0) for x in _as_written(r).tolist()]
    return torch.tensor([uniform(name, t) < share for t, share in enumerate(odds)], dtype=torch.bool)


def _tropd(settings: Any, r: Tokens, now: Moment, top_k: int) -> torch.Tensor:
    inside, reward = trusted(r, now), _reward(r, settings)
    if settings.outliers == "forward_kl":
        outside = _forward_kl(r, top_k)
    elif settings.outliers == "clip":
        outside = _ppo(r, reward.clamp(min=settings.reward_floor), settings)
    else:
        outside = torch.zeros_like(reward)
    return torch.where(inside, _ppo(r, reward, settings), outside)


def _eopd(settings: Any, r: Tokens, now: Moment, top_k: int) -> torch.Tensor:
    undecided = -(r.q.exp() * r.q).sum(-1) > settings.entropy_gate
    return _ppo(r, _reward(r, settings), settings) + settings.forward_weight * undecided.double() * _forward_kl(
        r, top_k
    )


def _iw_opd(settings: Any, r: Tokens, now: Moment, top_k: int) -> torch.Tensor:
    sizes = np.abs(_as_written(r).numpy())
    itself = settings.share == "inclusive"
    share = [sizes[: t + itself].sum() / sizes.sum() for t in range(len(sizes))]
    weight = 1 + settings.gain * (1 - np.array(share))
    return torch.from_numpy(weight) * _ppo(r, _reward(r, settings), settings)


def _reopold(settings: Any, rollouts: Sequence[Tokens], now: Moment) -> Losses:
    floor = math.log(settings.mixture) / (1 - settings.mixture)
    losses = [_ppo(r, _as_written(r).clamp(min=floor), settings) for r in rollouts]
    if now.step < settings.switch * now.steps:
        return [(loss, _as_written(r) >= floor) for loss, r in zip(losses, rollouts, strict=True)]
    candidates = [_as_written(r).numpy() >= (floor if settings.below_floor == "mask" else -np.inf) for r in rollouts]
    everyone = np.sort(
        np.concatenate([r.entropies.numpy()[mask] for r, mask in zip(rollouts, candidates, strict=True)])
    )
    edge = everyone[-max(1, round(settings.entropy_share * len(everyone)))]
    return [
        (loss, torch.from_numpy((r.entropies.numpy() >= edge) & mask))
        for loss, r, mask in zip(losses, rollouts, candidates, strict=True)
    ]


def _cross_tokenizer(settings: Any, r: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    advantages, taught = [], []
    logprobs = iter(r.written.tolist())
    for size, teacher in r.chunks:
        own = [next(logprobs) for _ in range(abs(size))]
        advantages += [min(max((teacher / sum(own) - 1) * logprob, -10.0), 10.0) for logprob in own]
        taught += [size > 0] * len(own)
    return _ppo(r, torch.tensor(advantages, dtype=r.written.dtype), settings), torch.tensor(taught, dtype=torch.bool)
