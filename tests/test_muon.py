"""The demo's optimizer against PyTorch's, which computes in bfloat16, and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from katds.data.muon import Muon, orthogonal

SHAPES = ((96, 512), (512, 96), (64, 64))


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    """Both against the same in float64: PyTorch's is away by bfloat16's rounding, ours by float32's, of weights fifty steps large too."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    exact = torch.nn.Parameter(start.double())
    optimizers = [
        Muon([weights[0]], lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.Muon([weights[1]], lr=0.02, weight_decay=0.1, momentum=0.95),
        Muon([exact], lr=0.02, weight_decay=0.1, momentum=0.95),
    ]
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for weight, optimizer in zip((*weights, exact), optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
    moved = exact.detach() - start.double()
    mine, theirs = ((weight.detach().double() - exact.detach()).norm() / moved.norm() for weight in weights)
    assert mine < 100 * torch.finfo(torch.float32).eps * (start.norm() / moved.norm()), mine
    assert theirs < 4 * torch.finfo(torch.bfloat16).eps, (
        f"another update than PyTorch's, not only in other numbers: {theirs}"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_keep_their_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonal(matrix) @ right.T
    large = values > 0.05 * values.norm() / len(values) ** 0.5  # five iterations do not lift the smallest
    assert ((inside.diagonal()[large] > 0.6) & (inside.diagonal()[large] < 1.3)).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9
