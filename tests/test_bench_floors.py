"""Floors of phases and of the GPU's cases, by hand: with a clock that is made up, and weights whose bytes can be counted."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen3Config

from katds.bench import floors
from katds.bench.floors import TALL, Products
from katds.bench.gpu import counts, machine


class Known(Products):
    """A product takes a second per row, and one more."""

    def multiply(self, rows: int) -> float:
        assert rows <= TALL
        return 1.0 + rows


def test_products_are_those_of_the_model() -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    products = Products.of(config, 60, torch.float32, torch.device("cpu"), math.inf)
    layer = [(8, 8), (4, 8), (4, 8), (8, 8), (24, 8), (24, 8), (8, 24)]  # q, k, v, out; gate, up, down
    assert [tuple(w.shape) for w in products.weights] == [*layer, *layer, (60, 8)]
    assert products.bytes == 4 * (2 * (64 + 32 + 32 + 64 + 3 * 192) + 480)
    assert products.multiply(3) > 0


@pytest.mark.parametrize(("count", "parts"), [(0, ["abcdefg"]), (2, ["abc", "def", "g"]), (3, ["ab", "cd", "ef", "g"])])
def test_products_layer_by_layer(count: int, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {torch.zeros(1, 1): name for name in "abcdefg"}
    seen: list[str] = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda rows, weight: seen.append(weights[weight] * len(rows)))
    for layer in Products(list(weights)).layers(2, count):
        layer()
        seen.append("|")
    assert "".join(seen) == "".join("".join(2 * name for name in part) + "|" for part in parts)


def test_above_a_height_time_is_in_proportion() -> None:
    products = Known([torch.zeros(1, 1)])
    assert products.seconds(4) == 5
    assert products.seconds(TALL) == TALL + 1
    assert products.seconds(3 * TALL) == 3 * (TALL + 1)


def test_a_forward_takes_at_least_as_long_as_reading_its_weights() -> None:
    weights = [torch.zeros(10, 5, dtype=torch.bfloat16), torch.zeros(20, 10)]  # 100 and 800 bytes
    products = Known(weights, bandwidth=90.0)
    assert products.bytes == 900
    assert [products.seconds(rows) for rows in (1, 9, 12)] == [10, 10, 13]
    assert products.total({1: 4, 12: 2}) == 4 * 10 + 2 * 13


def test_total_counts_every_forward() -> None:
    products = Known([torch.zeros(1, 1)])
    assert products.total({}) == 0 and products.total({0: 7}) == 0
    assert products.total({0: 7, 4: 2, 9: 3}) == 2 * 5 + 3 * 10
    assert products.total({600: 1, 4: 1}) == pytest.approx(600 / TALL * (TALL + 1) + 5)


def test_of_many_sizes_only_a_few_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def seconds(self: Products, rows: int) -> float:
        timed.append(rows)
        return 2.0 * rows

    monkeypatch.setattr(Products, "seconds", seconds)
    assert Products([]).total({rows: rows % 3 for rows in range(1, 201)}) == pytest.approx(
        sum(2 * rows * (rows % 3) for rows in range(1, 201))
    )
    assert len(timed) == 8 and {1, 200} <= set(timed)


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "median_seconds", lambda run, device: run() is not None and 0.5)
    assert floors.copy_bandwidth(torch.device("cpu"), 1000) == 4000


def test_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([100.0, 5.0, 1.0, 2.0, 9.0, 3.0])

    def run() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(floors.time, "perf_counter", lambda: now)
    assert floors.median_seconds(run, torch.device("cpu")) == 3.0


def test_operations_by_hand() -> None:
    assert counts.forward_flops(weights=10, tokens=3) == 60
    assert counts.training_flops(weights=10, tokens=3) == 6 * 10 * 3
    # 2 heads of 8 over 4 keys, half of them seen: 2 products of 2 x 2 x 8 x 2 FLOPs forward for each of 12 tokens, 5 backward.
    assert counts.attention_flops(tokens=12, length=4, heads=2, dim=8) == 7 * 12 * (2 * 2 * 8 * 2)
    shape = machine.Shape(hidden=64, inner=128, layers=3, heads=8, kv_heads=2, dim=5)
    # Keys and values of 2 heads, not of 8: 2 x 4 rollouts x 7 tokens x 3 layers x 2 x 5.
    assert counts.decode_floor_bytes(weights=1000, shape=shape, batch=4, context=7, itemsize=2) == 2 * (1000 + 1680)
