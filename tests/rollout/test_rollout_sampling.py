"""Sampling draws from the distribution that transformers' own filters leave, and from nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from katds.core import counter
from katds.rollout.sampling import Sampling, sample

FILTERS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=1),
    Sampling(top_k=1000),
    Sampling(top_p=0.9),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.1),
    Sampling(min_p=1.0),
    Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.02),
    Sampling(temperature=0.5, top_k=3, top_p=0.6),
]
NAMES = [f"T{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}" for s in FILTERS]


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [S, V] after transformers' processors, in the order in which its `generate` applies them."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain(None, logits.clone()).softmax(-1)


def draw(logits: torch.Tensor, keys: torch.Tensor, counters: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return sample(torch.log_softmax(logits / sampling.scale, -1), keys, counters, sampling)


def unmix(x: int) -> int:
    """The inverse of SplitMix64's finaliser."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        y = x
        for _ in range(64 // shift):
            y = x ^ (y >> shift)
        x = y * pow(factor, -1, 1 << 64) % (1 << 64)
    return x


def key_of(bits: int, position: int) -> int:
    """A key whose number at `position` has these 23 bits, e.g. the smallest and largest that exist."""
    x = (unmix(bits << 41) - 0x9E3779B97F4A7C15 * (position + 1)) % (1 << 64)
    made = x - (1 << 64) if x >= 1 << 63 else x
    assert counter.uniform(made, position) == (bits + 0.5) * 2.0**-23
    return made


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """From flat rows to peaked ones."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, rows)[:, None]
    return torch.randn(rows, vocabulary, generator=generator) * scale


@pytest.mark.parametrize("by", ["rollouts", "positions"])
@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_draws_follow_the_filtered_distribution(sampling: Sampling, by: str) -> None:
    """Chi-square over 20 tokens, along neighbouring rollouts and along the positions of one rollout."""
    logits = random_logits(3, 20)[1] * 1.5
    expected = filtered(logits[None], sampling)[0].double()
    count = 20_000
    if by == "rollouts":
        keys, counters = torch.tensor([counter.key(3, 1, i) for i in range(count)]), torch.full((count,), 12)
    else:
        keys, counters = torch.full((count,), counter.key(3, 1, 7)), torch.arange(count)
    drawn = draw(logits.expand(count, -1), keys, counters, sampling)
    observed = torch.bincount(drawn, minlength=20).double()
    assert observed[expected == 0].sum() == 0, "a token that the filters drop was sampled"
    kept = expected > 0
    statistic = ((observed - count * expected)[kept] ** 2 / (count * expected[kept])).sum().item()
    freedom = int(kept.sum()) - 1
    assert statistic <= freedom + 4.5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_the_kept_set_is_that_of_transformers(sampling: Sampling) -> None:
    """Exactly: a comb of random numbers, the smallest and the largest included, meets every token that holds more mass
    than the comb has gaps; here all do."""
    teeth, exact = 4096, 0
    keys = torch.tensor([key_of(tooth * (2**23 - 1) // (teeth - 1), 5) for tooth in range(teeth)])
    for row in random_logits(30, 24, seed=4):
        logits = row / row.std()
        kept = filtered(logits[None], sampling)[0]
        drawn = draw(logits.expand(teeth, -1), keys, torch.full((teeth,), 5), sampling)
        if kept[kept > 0].min() > 2 / teeth:
            assert drawn.unique().tolist() == kept.nonzero().flatten().tolist()
            exact += 1
    assert exact >= 25


@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
@pytest.mark.parametrize("bits", [0, 1, 2**23 - 2, 2**23 - 1])
def test_extreme_numbers_never_reach_a_dropped_token(sampling: Sampling, bits: int) -> None:
    """The smallest and largest random numbers, on 2,000 distributions of 300 tokens, half of which are impossible."""
    logits = random_logits(2000, 300, seed=1)
    logits[:1000, 150:] = -torch.inf
    logits[1000:, :150] = -torch.inf
    position = 9
    drawn = draw(logits, torch.full((2000,), key_of(bits, position)), torch.full((2000,), position), sampling)
    assert (filtered(logits, sampling).gather(-1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(top_k=2)])
@pytest.mark.parametrize("bits", [0, 2**22, 2**23 - 1])
def test_a_certain_token_is_always_drawn(sampling: Sampling, bits: int) -> None:
    """Probability one, and one minus less than float32 shows."""
    for others in (-torch.inf, -60.0, -30.0):
        logits = torch.full((7, 7), others).fill_diagonal_(0.0)
        drawn = draw(logits, torch.full((7,), key_of(bits, 0)), torch.zeros(7, dtype=torch.int64), sampling)
        assert drawn.tolist() == list(range(7))


def test_greedy_takes_the_most_probable_token_whatever_the_filters() -> None:
    logits = random_logits(50, 30)
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2)):
        assert torch.equal(draw(logits, torch.arange(50), torch.arange(50), sampling), logits.argmax(-1))


@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_a_row_does_not_know_its_neighbours(sampling: Sampling) -> None:
    logits, keys, counters = random_logits(40, 30), torch.arange(40) ** 5, torch.arange(40) % 7
    together = draw(logits, keys, counters, sampling)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits[order], keys[order], counters[order], sampling), together[order])
    alone = [draw(logits[i : i + 1], keys[i : i + 1], counters[i : i + 1], sampling) for i in range(40)]
    assert torch.equal(torch.cat(alone), together)
