"""Counter-based random numbers: the same for ever, on tensors and scalars, and random enough to sample from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from katds.core.counter import key, uniform, uniforms

INT64 = st.integers(-(2**63), 2**63 - 1)
BITS = 23


def bits(value: float) -> int:
    """The 23 random bits of a number."""
    return int(value * 2**BITS)


# SplitMix64 seeded with 1234567: the outputs that other implementations print (Vigna's C code, Rosetta Code).
SPLITMIX = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]

GOLDEN_KEYS = [-2152535657050944081, -7995527694508729151, -6411193824288604561, 8340098644114823013]
GOLDEN_BITS = [4245726, 7943860, 479312, 6856256]


def test_numbers_are_the_top_bits_of_splitmix64() -> None:
    assert [bits(uniform(1234567, i)) for i in range(5)] == [output >> (64 - BITS) for output in SPLITMIX]
    assert key(1234567) % 2**64 == SPLITMIX[0]


def test_golden_values() -> None:
    """Changing these changes every rollout of every recorded run."""
    assert key() == 0
    assert [key(0), key(1), key(0, 0), key(7, 3, 1000)] == GOLDEN_KEYS
    assert [bits(uniform(key(7, 3, 1000), t)) for t in (0, 1, 2, 4095)] == GOLDEN_BITS
    assert uniforms(torch.tensor(key(7, 3, 1000)), torch.arange(2)).tolist() == [
        (b + 0.5) / 2**BITS for b in GOLDEN_BITS[:2]
    ]


@given(keys=st.lists(INT64, min_size=1, max_size=20), counter=st.integers(0, 2**40))
def test_tensors_and_scalars_agree_bit_for_bit(keys: list[int], counter: int) -> None:
    counters = [counter + i for i in range(3)]
    drawn = uniforms(torch.tensor(keys)[:, None], torch.tensor(counters))
    assert drawn.dtype is torch.float32
    assert drawn.tolist() == [[uniform(k, c) for c in counters] for k in keys]
    assert bool(((drawn > 0) & (drawn < 1)).all())


@given(parts=st.lists(st.integers(0, 2**32), max_size=4))
def test_keys_are_signed_64_bit(parts: list[int]) -> None:
    torch.tensor(key(*parts), dtype=torch.int64)


def test_keys_differ_wherever_their_parts_do() -> None:
    """Seeds, steps and rollout ids count up from small numbers: no two (seed, step, id) may share a rollout's numbers,
    nor swap roles."""
    grid = {key(seed, step, rollout) for seed in range(4) for step in range(50) for rollout in range(500)}
    assert len(grid) == 4 * 50 * 500
    shorter = {key(seed, step) for seed in range(100) for step in range(100)} | {key(seed) for seed in range(100)}
    assert len(shorter) == 100 * 100 + 100 and not shorter & grid


def chi_square(cells: torch.Tensor, count: int) -> float:
    """How many standard deviations the chi-square statistic of `count` cells lies from what uniform numbers give."""
    observed = torch.bincount(cells, minlength=count).double()
    expected = cells.numel() / count
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return (statistic - (count - 1)) / math.sqrt(2 * (count - 1))


# [rollouts, positions] as a step draws them: consecutive ids, consecutive positions.
DRAWN = uniforms(torch.tensor([key(0, 17, i) for i in range(512)])[:, None], torch.arange(512))


@pytest.mark.parametrize("axis", [0, 1], ids=["neighbouring rollouts", "neighbouring positions"])
def test_numbers_are_uniform_and_independent(axis: int) -> None:
    u = DRAWN if axis else DRAWN.t()
    assert abs(chi_square((u * 256).long().flatten(), 256)) < 4
    pairs = (u[:, :-1] * 16).long() * 16 + (u[:, 1:] * 16).long()
    assert abs(chi_square(pairs.flatten(), 256)) < 4
    triples = ((u[:, :-2] * 6).long() * 6 + (u[:, 1:-1] * 6).long()) * 6 + (u[:, 2:] * 6).long()
    assert abs(chi_square(triples.flatten(), 216)) < 4
    centred = (u - 0.5).double()
    for lag in (1, 2, 8, 64, 256):
        correlation = 12 * (centred[:, lag:] * centred[:, :-lag]).mean().item()
        assert abs(correlation) < 4.5 / math.sqrt(512 * (512 - lag))
    # Each row alone too: a stream must not be worse for some rollouts. The largest of 512 normal numbers stays below 4.5.
    means = (u.double().mean(1) - 0.5) * math.sqrt(12 * 512)
    assert means.abs().max() < 4.5


def test_every_bit_is_fair() -> None:
    numbers = (DRAWN.double() * 2**BITS).long()
    for bit in range(BITS):
        share = ((numbers >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / 512
