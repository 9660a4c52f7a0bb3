"""Sampling the next token from logits, with counter-based random numbers.

Filters follow the field's order: temperature, top-k, top-p, min-p. The random number of a token is a hash of
(seed, step, rollout id, position), so a rollout does not depend on the slots around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from katds.core.counter import uniforms


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch the filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def scale(self) -> float:
        """The temperature of log-probabilities: that of sampling, or 1 for a greedy policy."""
        return self.temperature or 1.0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def sample(
    logprobs_SV: torch.Tensor, keys_S: torch.Tensor, counters_S: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """One token per row, int64 [S], with the random number of (key, counter); see `draw`."""
    return draw(logprobs_SV, uniforms(keys_S, counters_S), sampling)


def draw(logprobs_SV: torch.Tensor, u_S: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token per row, int64 [S], with random numbers u in (0, 1).

    `logprobs_SV` is the float32 log-softmax at the sampling temperature. Cost: one pass over the vocabulary; with a
    filter one sort. Inverse transform sampling: the first token whose cumulated probability exceeds u times the total.
    """
    if sampling.greedy:
        return logprobs_SV.argmax(-1)
    u = u_S[:, None]
    probabilities = logprobs_SV.exp()
    if not sampling.filtered:
        return _invert(probabilities, u)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(~_keep(ordered, sampling), 0.0)
    return ids.gather(-1, _invert(kept, u)[:, None]).squeeze(-1)


def _keep(ordered: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which of the descending probabilities survive. The most probable token always does."""
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1.0:
        # As in transformers, the token that crosses top_p stays; the mass is that of what top-k left.
        mass = ordered * keep
        total = mass.sum(-1, keepdim=True)
        keep &= mass.cumsum(-1) - mass < sampling.top_p * total
    if sampling.min_p > 0.0:
        keep &= ordered >= sampling.min_p * ordered[:, :1]
    keep[:, 0] = True
    return keep


def _invert(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # Rounding may lift u * total to total itself, and no token would then exceed it.
    target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    return (cumulated > target).to(torch.uint8).argmax(-1)  # the first of them; a parallel cumsum need not be monotone
