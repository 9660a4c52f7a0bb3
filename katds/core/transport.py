"""Optimal transport between windows of tokens: how far two are apart, and which token answers to which.

POT (pip install 'katds[topd]') solves; the one package that core takes besides torch, and only here.

Shapes: S pairs of windows, N and M tokens, H hidden, U different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

# Pairs that are solved together. Always so many, empty ones among them: another number would be other shapes, for which a library may
# sum in another order.
BLOCK = 16
FARTHEST = 2.0  # cost of opposite vectors


@dataclass(frozen=True, slots=True)
class Transport:
    """How two windows are compared.

    cost: of two tokens' vectors, in [0, 2]: 1 - cos, or the distance of the unit vectors.
    solver: entropic (`sinkhorn`, with `regularisation`, in units of the cost, and `iterations`), or `exact`.
    """

    cost: Literal["cosine", "euclidean"]
    solver: Literal["sinkhorn", "exact"]
    regularisation: float
    iterations: int

    def plan(self, cost_SNM: torch.Tensor, lengths_S2: torch.Tensor) -> torch.Tensor:
        if self.solver == "exact":
            return exact(cost_SNM, lengths_S2)
        return sinkhorn(cost_SNM, lengths_S2, self.regularisation, self.iterations)


def compare(
    embeddings_UH: torch.Tensor,
    ours_SN: torch.Tensor,
    theirs_SM: torch.Tensor,
    lengths_S2: torch.Tensor,
    transport: Transport,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transport between the tokens of each pair of windows, of uniform weights, at the cost of their embeddings.

    A pair's result is the same bits whatever other pairs there are, and in whatever order.

    Args:
        embeddings_UH: floating point; of the tokens that the windows name by their row.
        ours_SN, theirs_SM: rows of `embeddings_UH`; any row beyond a window's length.
        lengths_S2: int64, tokens of ours and of theirs, each at least 1.

    Returns:
        plan_SNM float64, sum 1, 0 beyond the lengths.
        distance_S float64 in [0, 2]: the mean cost under the plan, without the entropy.

    Time: `sinkhorn`: iterations x some 6 passes over [S, N, M] in float64, S rounded up to whole blocks: 6 ms per pair of 50 tokens and 200
    iterations on one CPU thread; `exact`: see there. Memory: a block's embeddings, and the plans.
    """
    pairs, missing = len(ours_SN), -len(ours_SN) % BLOCK
    ours_SN, theirs_SM = pad(ours_SN, (0, 0, 0, missing)), pad(theirs_SM, (0, 0, 0, missing))
    lengths_S2 = pad(lengths_S2, (0, 0, 0, missing), value=1)
    plans = [embeddings_UH.new_empty(0, ours_SN.shape[1], theirs_SM.shape[1], dtype=torch.float64)]
    distances = [embeddings_UH.new_empty(0, dtype=torch.float64)]
    for start in range(0, len(ours_SN), BLOCK):
        ours, theirs, lengths = (x[start : start + BLOCK] for x in (ours_SN, theirs_SM, lengths_S2))
        cost = COSTS[transport.cost](embeddings_UH[ours], embeddings_UH[theirs])
        plans.append(transport.plan(cost, lengths))
        distances.append((plans[-1] * cost).sum((1, 2)))
    return torch.cat(plans)[:pairs], torch.cat(distances)[:pairs]


def cosine_cost(x_SNH: torch.Tensor, y_SMH: torch.Tensor) -> torch.Tensor:
    """1 - cos(x, y), [S, N, M] float64 in [0, 2]; a vector of zeros is at right angles to all."""
    return (1.0 - _unit(x_SNH) @ _unit(y_SMH).mT).clamp(0.0, FARTHEST)


def euclidean_cost(x_SNH: torch.Tensor, y_SMH: torch.Tensor) -> torch.Tensor:
    """|x/|x| - y/|y||, [S, N, M] float64 in [0, 2]; a vector of zeros is 1 from all others."""
    # Not by sqrt(2 - 2 cos), which leaves some 1e-8 between equals.
    exact = "donot_use_mm_for_euclid_dist"
    distance_SNM: torch.Tensor = torch.cdist(_unit(x_SNH), _unit(y_SMH), compute_mode=exact)
    return distance_SNM.clamp(max=FARTHEST)


def _unit(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = x.double().norm(dim=-1, keepdim=True)
    return x.double() / norm.clamp(min=1e-12)


COSTS = {"cosine": cosine_cost, "euclidean": euclidean_cost}


def sinkhorn(
    cost_SNM: torch.Tensor, lengths_S2: torch.Tensor, regularisation: float, iterations: int = 200
) -> torch.Tensor:
    """argmin_P <P, cost> - regularisation x entropy(P) between uniform weights on the first tokens of either side (Cuturi 2013,
    arXiv 1306.0895), in the log domain.

    So many iterations, and not until a tolerance is met: POT would go on until the slowest pair of the block is done. Columns sum to
    their weights; of random windows of 50 tokens, after 200 iterations at the cost 1 - cos, rows lack some 1e-6 of the mass at a
    regularisation of 0.1, and some 1e-2 at 0.05; at the Euclidean cost some 1e-3 and 1e-2.

    Args:
        cost_SNM: float64, in [0, 2]; anything beyond the lengths.
        lengths_S2: int64, at least 1.
        regularisation: above 0, in units of the cost.

    Returns:
        plan_SNM, 0 beyond the lengths.
    """
    from ot.batch import bregman_log_projection_batch  # takes two seconds

    sizes = cost_SNM.shape[1:]
    row_SN, column_SM = (
        torch.arange(size, device=lengths_S2.device) < lengths_S.unsqueeze(-1)
        for size, lengths_S in zip(sizes, lengths_S2.T, strict=True)
    )
    # It starts from all columns alike: those beyond a window must not depend on what lies there.
    cost_SNM = cost_SNM.masked_fill(~(row_SN.unsqueeze(2) & column_SM.unsqueeze(1)), FARTHEST)
    weights = (inside / inside.sum(-1, keepdim=True, dtype=torch.float64) for inside in (row_SN, column_SM))
    solved = bregman_log_projection_batch(cost_SNM / -regularisation, *weights, max_iter=iterations, tol=0.0)
    plan_SNM: torch.Tensor = solved["T"]
    return plan_SNM


def exact(cost_SNM: torch.Tensor, lengths_S2: torch.Tensor) -> torch.Tensor:
    """argmin_P <P, cost> by POT's network simplex; arguments and result as those of `sinkhorn`.

    Time: one copy to the host for all pairs; 0.3 ms per pair of 50 tokens, one after the other, which grows with their cube.
    """
    from ot import emd

    costs, plan_SNM = cost_SNM.cpu(), torch.zeros_like(cost_SNM, device="cpu")
    for cost_NM, plan_NM, (rows, columns) in zip(costs, plan_SNM, lengths_S2.tolist(), strict=True):
        weights = (torch.full((size,), 1.0 / size, dtype=torch.float64) for size in (rows, columns))
        plan_NM[:rows, :columns] = emd(*weights, cost_NM[:rows, :columns].contiguous())
    return plan_SNM.to(cost_SNM.device)
