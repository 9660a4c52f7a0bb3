"""Sampling the next token from logits, with counter-based random numbers.

Filters follow the field's order: temperature, top-k, top-p, min-p. The random number of a token is a hash of
(seed, step, rollout id, position), so a rollout does not depend on the slots around it.

Invariants:
- A token is a function of its row of logits, its random number and the settings. Every way of filtering (candidates or
  histograms on CPU, bisection on CUDA) leaves the same weights over the vocabulary, and one draw serves them all.
- A token of zero probability, or one that a filter dropped, is never drawn, whatever the rounding.
- On CUDA nothing waits for the device and all shapes are static, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from katds.core.top_k import top_k as best_k

_CANDIDATES = 64  # the nucleus of a language model rarely holds more
_BELOW_ONE = 1 - 2.0**-50


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


@dataclass(slots=True)
class Drawn:
    """One token for each of S rows, and what was asked of the distribution at the temperature of sampling, before filters."""

    tokens_S: torch.Tensor  # int64
    top_ids_SK: torch.Tensor | None  # int64, in no particular order
    top_logprobs_SK: torch.Tensor | None  # float32
    logprobs_S: torch.Tensor | None = None  # float32, of the drawn tokens, under whatever they were drawn from
    entropies_S: torch.Tensor | None = None  # float32, nats


def sample_step(
    logits_SV: torch.Tensor,
    u_S: torch.Tensor,
    sampling: Sampling,
    top_k: int,
    logprob: bool = False,
    entropy: bool = False,
    policy_SV: torch.Tensor | None = None,
) -> Drawn:
    """Draws one token per row with random numbers u in (0, 1), and reports its K = min(top_k, V) best; 0 reports none. On request
    also its log-probability and the entropy. With `policy_SV`, log-probabilities at the temperature of sampling, tokens are drawn
    from these; all else goes on describing the logits.

    `logits_SV` may have any floating dtype; probabilities are float32. Cost over [S, V]: one softmax and one pass of
    block sums; one pass of block maxima for K; two for the entropy; a division unless the temperature is 1. On CPU a filter adds one
    zero-filled [S, V] if the best tokens hold the nucleus; on CUDA top-p adds some 30 masked sums.
    """
    if sampling.greedy and top_k == 0 and not logprob and not entropy:
        return Drawn(logits_SV.argmax(-1), None, None)
    scaled = logits_SV if sampling.scale == 1.0 else logits_SV.float() / sampling.scale
    probabilities = scaled.softmax(-1, dtype=torch.float32)
    ids = logprobs = None
    if top_k > 0:
        best, ids = best_k(scaled, min(top_k, scaled.shape[-1]))
        # The best token alone gives the normaliser, so the others' logarithms survive where their exponential does not.
        best, best_probability = best.float(), probabilities.gather(-1, ids).amax(-1, keepdim=True)
        logprobs = best - best.amax(-1, keepdim=True) + best_probability.log()
    weights, known = (probabilities, ids) if policy_SV is None else (policy_SV.exp(), None)
    tokens = logits_SV.argmax(-1) if sampling.greedy else _draw(weights, u_S, sampling, known)
    drawn = Drawn(tokens, ids, logprobs)
    if logprob:
        drawn.logprobs_S = weights.gather(-1, tokens[:, None]).squeeze(-1).log()
    if entropy:
        values = scaled.float()
        mean = torch.linalg.vecdot(probabilities, values.clamp(min=torch.finfo(torch.float32).min))
        drawn.entropies_S = values.logsumexp(-1) - mean
    return drawn


def _draw(
    probabilities_SV: torch.Tensor, u_S: torch.Tensor, sampling: Sampling, best_ids_SM: torch.Tensor | None = None
) -> torch.Tensor:
    """One token per row of the filtered probabilities. `best_ids_SM`, if known, are the most probable tokens."""
    if not sampling.filtered:
        return _invert(probabilities_SV, u_S)
    if not sampling.top_k and sampling.top_p == 1.0:
        return _invert(_above_min_p(probabilities_SV, probabilities_SV, sampling.min_p), u_S)
    if probabilities_SV.is_cuda:
        return _invert(_kept_by_edge(probabilities_SV, sampling), u_S)
    return _invert(_kept_by_candidates(probabilities_SV, best_ids_SM, sampling), u_S)


# The draw.


def _invert(weights_SV: torch.Tensor, u_S: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling in two levels: which column of a [B, V / B] matrix holds u times the total, then which
    of its elements. Two cumulated sums of some sqrt(V) elements instead of one of V."""
    rows = _rows(weights_SV.shape[-1])
    weights = weights_SV.unflatten(-1, (rows, -1))
    sums = weights.sum(-2)
    column, rest = _locate(sums, u_S[:, None].double())
    inside = weights.gather(-1, column[:, :, None].expand(-1, rows, -1)).squeeze(-1)
    row, _ = _locate(inside / sums.gather(-1, column), rest)
    return torch.add(column, row, alpha=weights.shape[-1]).squeeze(-1)


def _locate(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first weight [S, 1] at which the cumulated sum exceeds u in [0, 1) times the total, and how far u reaches
    into it, as a fraction in [0, 1). The weights are at least 0 and add up to some 1.

    Always a positive weight, on every device: in integers a cumulated sum is exact and therefore monotone, however it
    is parallelised, and the floor of u times the total is less than the total. What lies below 2^-60 counts as zero.
    """
    units = (weights * 2.0**60).long()
    cumulated = units.cumsum(-1)
    target = (cumulated[:, -1:] * u).long()
    # Only a row that has a NaN can miss; on CUDA an index out of bounds would end the process.
    index = torch.searchsorted(cumulated, target, right=True).clamp(max=weights.shape[-1] - 1)
    unit = units.gather(-1, index)
    into = target - cumulated.gather(-1, index) + unit
    return index, (into / unit.double()).clamp(max=_BELOW_ONE)


@cache
def _rows(vocabulary: int) -> int:
    """The largest divisor of V up to its root; at worst, of a prime, 1: the draw is then one cumsum over V."""
    return max(rows for rows in range(1, int(vocabulary**0.5) + 1) if vocabulary % rows == 0)


# The filters. Each way returns the probabilities [S, V] with zeros for what was dropped.


def _kept_by_candidates(
    probabilities_SV: torch.Tensor, best_ids_SM: torch.Tensor | None, sampling: Sampling
) -> torch.Tensor:
    """Sorts the best M tokens only. Rows whose kept tokens may reach beyond them are done again, by `_kept_by_edge`."""
    vocabulary = probabilities_SV.shape[-1]
    # One more than top_k, to see whether its last is tied.
    wanted = min(sampling.top_k + 1 if sampling.top_k > 0 else _CANDIDATES, vocabulary)
    if best_ids_SM is None or best_ids_SM.shape[-1] < wanted:
        best_ids_SM = best_k(probabilities_SV, wanted)[1]
    ids = best_ids_SM.sort(dim=-1).values  # so that the stable sort orders equal probabilities by token
    ordered, order = probabilities_SV.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    keep = _keep(ordered, sampling)
    kept = torch.zeros_like(probabilities_SV).scatter_(-1, ids.gather(-1, order), ordered * keep)
    if ids.shape[-1] < vocabulary:
        # All tokens as probable as the last kept one must be candidates. The margin is for a vectorised exp that is not
        # monotone in its last bits, as the candidates may have been chosen by their logits.
        edge, last = ordered.masked_fill(~keep, 1.0).amin(-1), ordered[:, -1]
        open_rows = ((edge <= 1.00001 * last) & (last > 0)).nonzero().squeeze(-1)
        if open_rows.numel():
            kept[open_rows] = _kept_by_edge(probabilities_SV[open_rows], sampling)
    return kept


def _keep(ordered: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Which of the descending probabilities survive: a prefix. The most probable token always does."""
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1.0:
        # As in transformers, the token that crosses top_p stays; the mass is that of what top-k left.
        cumulated = ordered.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, : sampling.top_k][:, -1:] if sampling.top_k > 0 else 1.0
        keep &= cumulated - ordered < sampling.top_p * total
    if sampling.min_p > 0.0:
        keep &= ordered >= sampling.min_p * ordered[:, :1]
    keep[:, 0] = True
    return keep


def _kept_by_edge(probabilities_SV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Without a look at the values by the host: finds the least kept probability and how many tokens that have it
    stay, the first ones of the vocabulary."""
    if sampling.top_k > 0:
        best, _ = best_k(probabilities_SV, min(sampling.top_k, probabilities_SV.shape[-1]))
        ordered = best.sort(dim=-1, descending=True).values
        keep = _keep(ordered, sampling)
        edge = ordered.masked_fill(~keep, 1.0).amin(-1, keepdim=True)
        ties = ((ordered == edge) & keep).sum(-1, keepdim=True)
    else:
        find = _edge_by_bisection if probabilities_SV.is_cuda else _edge_by_histogram
        edge = find(probabilities_SV, sampling.top_p)
        missing = sampling.top_p - _mass(probabilities_SV, probabilities_SV > edge)
        ties = (missing / edge).ceil().clamp(min=1)
    tied = probabilities_SV == edge
    keep = (probabilities_SV > edge) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= ties))
    return _above_min_p(probabilities_SV * keep, probabilities_SV, sampling.min_p)


# The edge of the nucleus: the largest value [S, 1] whose equals and betters hold top_p. Its bits are searched, since
# those of non-negative float32 are ordered as the numbers are; 30 of them describe all numbers up to 1.


def _edge_by_bisection(probabilities_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """One bit at a time. Cost: 30 masked sums over V, of static shape."""
    best = probabilities_SV.amax(-1, keepdim=True)
    bits = torch.zeros_like(best, dtype=torch.int32)
    for bit in range(29, -1, -1):
        raised = bits | 1 << bit
        mass = _mass(probabilities_SV, probabilities_SV >= raised.view(torch.float32))
        bits = torch.where(mass >= top_p, raised, bits)
    return torch.minimum(bits.view(torch.float32), best)


def _edge_by_histogram(probabilities_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Ten bits at a time. Cost: 3 histograms over V; on CUDA their sums would depend on the order of atomics."""
    bits, mass = probabilities_SV.view(torch.int32), probabilities_SV.double()
    found = torch.zeros_like(bits[:, :1])
    better = torch.zeros_like(mass[:, :1])  # the mass of larger leading bits than those found
    for shift in (20, 10, 0):
        leading = bits >> shift
        mass_here = mass if shift == 20 else mass * (leading >> 10 == found)
        bins = mass.new_zeros(mass.shape[0], 1024).scatter_add_(-1, (leading & 1023).long(), mass_here)
        at_least = better + bins.flip(-1).cumsum(-1)  # of bin 1023, then of 1022 and 1023, ...
        skipped = (at_least < top_p).sum(-1, keepdim=True).clamp(max=1023)
        better = at_least.gather(-1, skipped) - bins.gather(-1, 1023 - skipped)
        found = (found << 10) + (1023 - skipped).int()
    return torch.minimum(found.view(torch.float32), probabilities_SV.amax(-1, keepdim=True))


def _mass(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (probabilities * mask).sum(-1, keepdim=True, dtype=torch.float64)


def _above_min_p(weights: torch.Tensor, probabilities: torch.Tensor, min_p: float) -> torch.Tensor:
    if min_p == 0.0:
        return weights
    return weights * (probabilities >= min(min_p, 1.0) * probabilities.amax(-1, keepdim=True))
