"""PPO's clipped surrogate of a policy gradient, for tokens that were sampled from an earlier student."""

from __future__ import annotations

import torch


def clipped_policy_gradient(
    logprobs_T: torch.Tensor, written_T: torch.Tensor, advantage_T: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = p(y) / p_written(y) (PPO, arXiv 1707.06347, eq. 7).

    rho makes tokens that an earlier student wrote count as if the present one had. A token that has already moved out of the interval
    in the direction of its advantage gets no gradient; one that moved the other way does. Where rho is 1 the gradient is that
    of -A log p(y): in the first update after writing, up to the rounding between writing and learning.

    Args:
        logprobs_T: log p(y) of the present student, differentiable.
        written_T: log p(y) when the token was written.
        advantage_T: of the sampled token; no gradient should reach it.
        low, high: how far the ratio counts below and above 1; unequal ones are DAPO's clip-higher (arXiv 2503.14476).

    Returns:
        [T] losses. Only their gradient has a meaning.
    """
    ratio_T = (logprobs_T - written_T).exp()
    clipped_T = ratio_T.clamp(1.0 - low, 1.0 + high)
    # Inside the interval both are equal; `minimum` then halves the gradient between them, and the halves add up.
    return -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
