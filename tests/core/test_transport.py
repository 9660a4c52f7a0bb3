"""Entropic transport against POT, and that a pair's result is its own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial.distance import cdist

from katds.core.transport import BLOCK, Transport, compare, cosine_cost, exact, sinkhorn

WINDOW, HIDDEN, WORDS = 50, 24, 40
USUAL = Transport("cosine", "sinkhorn", 0.1, 200)


def pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Embeddings and ragged windows over few words, so that some occur in both, and several times."""
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randint(WORDS, (2, count, WINDOW), generator=draw)
    lengths = torch.randint(1, WINDOW + 1, (count, 2), generator=draw)
    lengths[0] = WINDOW
    return torch.randn(WORDS, HIDDEN, generator=draw), ours, theirs, lengths


@pytest.mark.parametrize("regularisation", [0.1, 0.2, 1.0])
def test_plan_and_distance_are_those_of_a_single_problem(regularisation: float) -> None:
    """POT's solver of one problem, in numpy, iterates until its marginals are right to 1e-12; what is left is the 1e-6 of the mass that
    our 200 iterations may lack, on either side, at a cost of at most 2. Linear programming bounds the distance."""
    embeddings, ours, theirs, lengths = pairs(12)
    plans, distances = compare(embeddings, ours, theirs, lengths, replace(USUAL, regularisation=regularisation))
    for i, (n, m) in enumerate(lengths.tolist()):
        x, y = (embeddings[rows].double().numpy() for rows in (ours[i, :n], theirs[i, :m]))
        cost = cdist(x, y, "cosine")
        a, b = np.full(n, 1 / n), np.full(m, 1 / m)
        plan = ot.sinkhorn(a, b, cost, regularisation, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12)
        assert np.abs(plans[i, :n, :m].numpy() - plan).sum() < 2e-6
        assert distances[i].item() == pytest.approx((plan * cost).sum(), abs=4e-6)
        assert not plans[i, n:].any() and not plans[i, :, m:].any()
        least = ot.emd2(a, b, cost)
        assert least - 4e-6 <= distances[i].item() <= least + regularisation * math.log(n * m) + 4e-6


def test_columns_are_exact_and_rows_nearly() -> None:
    """What the docstring promises."""
    embeddings, ours, theirs, lengths = pairs(40, seed=1)
    cost = cosine_cost(embeddings[ours], embeddings[theirs])
    for regularisation, lacking in ((0.1, 1e-6), (0.05, 0.02)):
        plan = sinkhorn(cost, lengths, regularisation)
        for part, (n, m) in zip(plan, lengths.tolist(), strict=True):
            columns = torch.full((m,), 1 / m, dtype=torch.float64)
            torch.testing.assert_close(part.sum(0)[:m], columns, rtol=1e-12, atol=0)
            assert (part.sum(1)[:n] - 1 / n).abs().sum() < lacking


@pytest.mark.parametrize("cost", ["cosine", "euclidean"])
def test_the_exact_plan_is_the_cheapest(cost: str) -> None:
    """Linear programming by scipy on windows of a few tokens; marginals to rounding; never dearer than the entropic plan."""
    embeddings, ours, theirs, _ = pairs(8, seed=5)
    lengths = torch.tensor([[6, 6], [5, 8], [1, 4], [7, 1], [8, 8], [3, 2], [2, 6], [8, 5]])
    plans, distances = compare(embeddings, ours, theirs, lengths, Transport(cost, "exact", 0.1, 1))
    _, entropic = compare(embeddings, ours, theirs, lengths, Transport(cost, "sinkhorn", 0.1, 200))
    for i, (n, m) in enumerate(lengths.tolist()):
        x, y = (embeddings[rows].double().numpy() for rows in (ours[i, :n], theirs[i, :m]))
        if cost == "euclidean":
            x, y = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, y))
        costs = cdist(x, y, cost)
        rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
        weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
        best = linprog(costs.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=weights).fun
        assert distances[i].item() == pytest.approx(best, abs=1e-9)
        assert distances[i] <= entropic[i] + 1e-6
        assert plans[i].sum(0)[:m].tolist() == pytest.approx([1 / m] * m)
        assert plans[i].sum(1)[:n].tolist() == pytest.approx([1 / n] * n)
        assert not plans[i, n:].any() and not plans[i, :, m:].any()


def test_more_iterations_leave_less_astray() -> None:
    embeddings, ours, theirs, lengths = pairs(16, seed=6)
    cost, astray = cosine_cost(embeddings[ours], embeddings[theirs]), []
    for iterations in (5, 50, 500):
        rows = sinkhorn(cost, lengths, 0.05, iterations).sum(2)
        wanted = (torch.arange(WINDOW) < lengths[:, :1]) / lengths[:, :1]
        astray.append(float((rows - wanted).abs().sum(1).max()))
    assert astray[0] > 3 * astray[1] > 9 * astray[2]
    assert torch.equal(exact(cost[:0], lengths[:0]), cost[:0])


def test_a_pair_s_result_does_not_depend_on_the_others() -> None:
    """Bit for bit: alone, in another order, at another place of a block, and with other tokens around."""
    embeddings, ours, theirs, lengths = pairs(2 * BLOCK + 3, seed=2)
    plans, distances = compare(embeddings, ours, theirs, lengths, USUAL)
    for order in (range(2 * BLOCK + 2, -1, -1), range(5, 12), [7]):
        at = torch.tensor(list(order))
        some = compare(embeddings, ours[at], theirs[at], lengths[at], USUAL)
        assert torch.equal(some[0], plans[at]) and torch.equal(some[1], distances[at])
    more = torch.cat([torch.randn(5, HIDDEN), embeddings])
    shifted = compare(more, ours + 5, theirs + 5, lengths, USUAL)
    assert torch.equal(shifted[0], plans) and torch.equal(shifted[1], distances)


def test_what_lies_beyond_a_window_has_no_say() -> None:
    embeddings, ours, theirs, lengths = pairs(6, seed=3)
    beyond = torch.arange(WINDOW) >= lengths.unsqueeze(-1)
    other = compare(embeddings, ours.masked_fill(beyond[:, 0], 1), theirs.masked_fill(beyond[:, 1], 2), lengths, USUAL)
    for mine, theirs_too in zip(compare(embeddings, ours, theirs, lengths, USUAL), other, strict=True):
        assert torch.equal(mine, theirs_too)


def test_no_pairs_and_single_tokens() -> None:
    embeddings, ours, theirs, lengths = pairs(3, seed=4)
    plans, distances = compare(embeddings[:0], ours[:0], theirs[:0], lengths[:0], USUAL)
    assert plans.shape == (0, WINDOW, WINDOW) and distances.shape == (0,)
    plans, distances = compare(embeddings, ours, theirs, torch.ones_like(lengths), USUAL)
    cosine = torch.cosine_similarity(embeddings[ours[:, 0]].double(), embeddings[theirs[:, 0]].double())
    torch.testing.assert_close(distances, 1 - cosine, rtol=1e-12, atol=1e-15)
    assert plans[:, 0, 0].tolist() == pytest.approx([1.0] * 3)


def test_an_embedding_of_zeros_is_far_from_all() -> None:
    vectors = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.0, 1.0]]])
    expected = torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 2], [1, 1, 2, 0]]).double()
    torch.testing.assert_close(cosine_cost(vectors, vectors)[0], expected)
