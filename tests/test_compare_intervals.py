"""Student's t, intervals and paired differences against tables and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from katds.compare.intervals import interval, paired, t_quantile, within


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814), (30, 2.04227), (120, 1.97993)],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=3e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 7])
def test_the_series_is_the_integral_of_the_density(freedom: int) -> None:
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    t, parts = 1.7, 2000
    middles = ((i + 0.5) * t / parts for i in range(parts))
    area = sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles) * 2 * t / parts
    assert within(t, freedom) == pytest.approx(area, rel=1e-6)


def test_an_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 6.0])  # variance (4 + 1 + 9) / 2 = 7
    assert found.mean == 3.0 and found.values == 3
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(3.0) and found.high > 3.0


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert interval([2.0]) == (2.0, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_pairs_are_of_equal_seeds() -> None:
    """Noise that both share is no noise of the difference."""
    found = paired({0: 1.5, 1: 8.5, 2: 4.5, 7: 100.0}, {2: 4.0, 0: 1.0, 1: 8.0, 3: -50.0})
    assert found == (0.5, 0.0, 3)
    assert paired({0: 1.0}, {1: 1.0}) is None
