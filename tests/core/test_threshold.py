"""The adaptive threshold: numpy's quantile, a FIFO, a warm-up, and a state that survives JSON to the last bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from katds.core.threshold import AdaptiveThreshold, quantile

MINIMA = st.lists(st.floats(-1.0, 50.0), min_size=1, max_size=60)


@given(MINIMA, st.floats(0, 1))
def test_quantile_has_the_bits_of_numpy(values: list[float], q: float) -> None:
    assert quantile(sorted(values), q) == np.quantile(values, q)


@given(MINIMA, st.floats(0, 1))
def test_quantile_agrees_with_torch(values: list[float], q: float) -> None:
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()
    assert quantile(sorted(values), q) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(MINIMA, st.floats(0.01, 0.99), st.integers(1, 20))
def test_value_is_the_upper_quantile_of_the_newest_minima(values: list[float], eta: float, capacity: int) -> None:
    threshold = AdaptiveThreshold(eta, capacity, min_entries=1, min_steps=0)
    threshold.push(values)
    assert threshold.value is None, "set only between steps"
    threshold.finish_step()
    assert threshold.entries == min(capacity, len(values))
    assert threshold.value == np.quantile(values[-capacity:], 1 - eta)


def test_a_larger_eta_terminates_less() -> None:
    values = []
    for eta in (0.1, 0.3, 0.9):
        threshold = AdaptiveThreshold(eta, 100, 1, 0)
        threshold.push(float(v) for v in range(100))
        threshold.finish_step()
        values.append(threshold.value)
    assert values == pytest.approx([89.1, 69.3, 9.9])


def test_it_is_warm_once_both_entries_and_steps_suffice() -> None:
    threshold = AdaptiveThreshold(0.3, capacity=8, min_entries=4, min_steps=3)
    warm = []
    for pushed in ([1.0, 2.0, 3.0, 4.0], [], [5.0], []):
        threshold.push(pushed)
        threshold.finish_step()
        warm.append(threshold.value is not None)
    assert warm == [False, False, True, True]
    few = AdaptiveThreshold(0.3, capacity=8, min_entries=4, min_steps=1)
    few.push([1.0, 2.0, 3.0])
    few.finish_step()
    assert few.value is None
    few.push([4.0])
    few.finish_step()
    assert few.value is not None


@given(MINIMA, MINIMA)
def test_a_resumed_threshold_goes_on_bit_for_bit(before: list[float], after: list[float]) -> None:
    def make() -> AdaptiveThreshold:
        return AdaptiveThreshold(0.3, capacity=16, min_entries=2, min_steps=2)

    straight = make()
    straight.push(before)
    straight.finish_step()
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for threshold in (straight, resumed):
        assert threshold.value is None  # one step of two
        threshold.push(after)
        threshold.finish_step()
    assert resumed.value == straight.value is not None
    again = make()
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert again.value == straight.value
    assert again.state_dict() == straight.state_dict()


@pytest.mark.parametrize("arguments", [(0.0, 8, 1, 0), (1.0, 8, 1, 0), (0.3, 8, 9, 0), (0.3, 8, 0, 0)])
def test_impossible_settings_are_refused(arguments: tuple[float, int, int, int]) -> None:
    with pytest.raises(AssertionError):
        AdaptiveThreshold(*arguments)
