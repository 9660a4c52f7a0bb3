"""The K largest by block maxima are those of a full selection."""

from __future__ import annotations

import pytest
import torch

from katds.core.top_k import _block, top_k

SHAPES = [
    (1, 1, 1),
    (5, 7, 7),
    (3, 300, 1),
    (4, 1009, 16),
    (16, 2048, 64),
    (2, 2047, 64),
    (3, 16391, 64),
    (2, 50257, 100),
]


def rows_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(rows, columns, generator=generator)
    match kind:
        case "ties":
            return (normal * 2).round()
        case "constant":
            return torch.ones(rows, columns)
        case "rising":
            return torch.arange(columns, dtype=torch.float32).expand(rows, -1)
        case "infinite":
            return normal.masked_fill(normal < 1.5, -torch.inf)
        case "bfloat16":
            return normal.bfloat16()
    return normal


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "rising", "infinite", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns", "k"), SHAPES)
def test_it_is_the_k_largest(rows: int, columns: int, k: int, kind: str) -> None:
    values = rows_of(kind, rows, columns)
    best, ids = top_k(values, k)
    assert ids.dtype == torch.int64 and best.shape == ids.shape == (rows, k)
    assert torch.equal(best.sort(-1, descending=True).values, values.topk(k).values)
    assert torch.equal(values.gather(-1, ids), best)
    assert all(row.unique().numel() == k for row in ids)


@pytest.mark.parametrize(("columns", "k"), [(2048, 64), (16391, 16)])
def test_the_largest_may_all_lie_in_one_block_or_in_the_rest(columns: int, k: int) -> None:
    blocks = columns // _block(columns, k)
    assert blocks < columns
    for first, step in ((5, blocks), (columns - k, 1), (0, 1)):
        places = torch.arange(first, columns, step)[:k]
        values = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
        values[0, places] += 100.0
        assert set(places.tolist()) <= set(top_k(values, k)[1][0].tolist())


@pytest.mark.parametrize("columns", [100, 4100])
def test_nan_is_the_largest(columns: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    values[1, [3, columns - 1]] = torch.nan
    best, ids = top_k(values, 16)
    assert best.isnan().sum(-1).tolist() == [0, 2, 0] and {3, columns - 1} <= set(ids[1].tolist())
    assert torch.equal(best[[0, 2]].sort(-1).values, values[[0, 2]].topk(16).values.flip(-1))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_know_its_neighbours(threads: int) -> None:
    """Ties included: the same ones are taken, in the same order. Nor does it matter how the rows lie in memory."""
    torch.set_num_threads(threads)
    try:
        values = rows_of("ties", 40, 4100)
        best, ids = top_k(values, 64)
        alone = [top_k(values[i : i + 1], 64)[1] for i in range(40)]
        wide = torch.cat([values, values], dim=-1)[:, :4100]
        assert torch.equal(torch.cat(alone), ids)
        assert torch.equal(top_k(wide, 64)[1], ids) and torch.equal(top_k(values.t().contiguous().t(), 64)[0], best)
    finally:
        torch.set_num_threads(1)


def test_nothing_waits_for_the_device() -> None:
    """A tensor without data can be asked for shapes only."""
    best, ids = top_k(torch.empty(4, 4100, device="meta"), 64)
    assert best.shape == ids.shape == (4, 64)
