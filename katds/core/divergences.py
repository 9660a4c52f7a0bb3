"""Divergences between the student p and the teacher q, per token, from log-probabilities.

Every function reduces the last axis, takes float32 or float64, returns nats in that type and can be differentiated once,
except `sampled_reverse_kl`. The student always comes first, whatever the direction of the divergence.

A log-probability of -inf is a probability of zero: it adds nothing to a sum and its gradient is zero. Where the first
distribution of a KL has mass and the second has none, the KL is +inf, as it must be.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def reverse_kl(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) log(p(v)/q(v)), mode seeking.

    Args:
        p_logprobs: [..., V] student log-probabilities.
        q_logprobs: [..., V] teacher log-probabilities, of the same shape.

    Returns:
        [...] nats. Rounding in float32 may leave about -1e-7 where p equals q.

    Raises:
        RuntimeError: a backward pass with create_graph=True; there is no second derivative.

    Cost: two tensors of the input's size are kept for the backward pass.
    """
    divergence: torch.Tensor = _ReverseKl.apply(p_logprobs, q_logprobs)  # type: ignore[no-untyped-call]
    return divergence


def forward_kl(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(q || p) = sum_v q(v) log(q(v)/p(v)), mass covering; student first. Shapes, units and cost as `reverse_kl`."""
    return reverse_kl(q_logprobs, p_logprobs)


def generalised_jsd(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor, beta: float) -> torch.Tensor:
    """JSD(beta) = beta KL(q || m) + (1-beta) KL(p || m), m = beta q + (1-beta) p (GKD, arXiv 2306.13649, eq. 1).

    beta 0 is the forward KL and 1 the reverse KL by definition, as in TRL and in DeepSpeed. The inside of the
    interval does not join them: the formula vanishes at both ends (JSD/beta tends to the forward KL), so the scale of
    the loss jumps there.

    Raises:
        ValueError: beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}, outside [0, 1]; 0 is the forward KL, 1 the reverse KL")
    if beta == 0.0:
        return forward_kl(p_logprobs, q_logprobs)
    if beta == 1.0:
        return reverse_kl(p_logprobs, q_logprobs)
    # One finite side is enough: log(0 + 0) has no slope, and inf - inf in its gradient would be nan.
    mixture = torch.logaddexp(p_logprobs + math.log1p(-beta), _finite(q_logprobs) + math.log(beta))
    return beta * reverse_kl(q_logprobs, mixture) + (1.0 - beta) * reverse_kl(p_logprobs, mixture)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """-sum_v p(v) log p(v): [..., V] -> [...] nats."""
    mean: torch.Tensor = torch.linalg.vecdot(logprobs.exp(), _finite(logprobs))
    return -mean


def tail_logprob(top_logprobs: torch.Tensor) -> torch.Tensor:
    """log(1 - P_S): the mass outside S from the log-probabilities [..., K] in S -> [...].

    Accuracy in float32 (K = 64, V = 32768, against float64, tails from 0.97 to 1e-32): the tail mass is off by no more
    than the log-probabilities themselves, at most 6e-6 with AVX-512 and 1.3e-5 without; summing in float64 changes nothing. Below
    epsilon (1.2e-7; also K >= V, where nothing is left) the result stays at log(epsilon) = -15.9 and passes no
    gradient on; log(0) and its infinite slope never occur.
    """
    log_mass = _finite(top_logprobs).logsumexp(-1)
    log_mass = log_mass.clamp(max=-torch.finfo(top_logprobs.dtype).eps)
    return _log1mexp(log_mass)


def top_k_tail_reverse_kl(p_top: torch.Tensor, q_top: torch.Tensor) -> torch.Tensor:
    """sum_S p log(p/q) + (1-P_S) log((1-P_S)/(1-Q_S)): KL(p || q) on K tokens and one bucket for the rest.

    S is any set of tokens; with the student's K most probable ones it is KAT's d_t (arXiv 2606.09471). A lower bound
    of the full reverse KL (data-processing inequality). Without the bucket the sum would be biased and its gradient
    would push mass out of S, so no such variant exists here.

    Args:
        p_top: [..., K] student log-probabilities at S, normalised over the whole vocabulary.
        q_top: [..., K] teacher log-probabilities at the same tokens.

    Returns:
        [...] nats. In float32 off by no more than the log-probabilities are (K = 64, V = 32768: 4e-6, the full KL likewise). Where the
        teacher's tail is below 1.2e-7 and the student's is not, the value falls short by (1-P_S) log(1.2e-7/(1-Q_S)).
    """
    return reverse_kl(_with_tail(p_top), _with_tail(q_top))


def top_k_tail_forward_kl(p_top: torch.Tensor, q_top: torch.Tensor) -> torch.Tensor:
    """sum_S q log(q/p) + (1-Q_S) log((1-Q_S)/(1-P_S)): KL(q || p) on K tokens and one bucket.

    S is any set of tokens; forward KL has its weight on the teacher's K most probable ones. Shapes, units and accuracy
    as `top_k_tail_reverse_kl`.
    """
    return forward_kl(_with_tail(p_top), _with_tail(q_top))


def sampled_reverse_kl(p_sampled: torch.Tensor, q_sampled: torch.Tensor) -> torch.Tensor:
    """log p(y) - log q(y) at tokens y sampled from p: the k1 estimate of KL(p || q). Value only, [...] -> [...] nats.

    The result is detached, so that it cannot be differentiated: the gradient of log p(y) averages to zero under p and
    says nothing about the KL. The objective `policy_gradient` has the right gradient.
    """
    return (p_sampled - q_sampled).detach()


class _ReverseKl(torch.autograd.Function):
    """See `reverse_kl`. By hand it takes half the passes over [..., V] that autograd takes, and half its memory."""

    @staticmethod
    def forward(ctx: Any, p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
        assert p_logprobs.shape == q_logprobs.shape, (p_logprobs.shape, q_logprobs.shape)
        probabilities = p_logprobs.exp()
        # Both logs may be -inf, or p may underflow against q = 0: 0 * (inf or nan) would poison the value and every
        # gradient.
        log_ratio = (p_logprobs - q_logprobs).masked_fill_(probabilities == 0, 0.0)
        ctx.save_for_backward(probabilities, log_ratio)
        return (probabilities * log_ratio).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """d/dlog p = p (log(p/q) + 1), d/dlog q = -p."""
        if torch.is_grad_enabled():
            raise RuntimeError("the KL cannot be differentiated twice; call backward without create_graph=True")
        probabilities, log_ratio = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        by_p = (log_ratio + 1.0).mul_(probabilities).mul_(grad) if ctx.needs_input_grad[0] else None
        return by_p, (probabilities * -grad if ctx.needs_input_grad[1] else None)


def _finite(logprobs: torch.Tensor) -> torch.Tensor:
    """-inf becomes the type's most negative number, with gradient zero: sums of logs then never meet inf - inf."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min)


def _with_tail(top_logprobs: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., K+1], the distribution over S and the rest."""
    return torch.cat([top_logprobs, tail_logprob(top_logprobs).unsqueeze(-1)], -1)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, each branch where it keeps its digits (Maechler 2012)."""
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))
