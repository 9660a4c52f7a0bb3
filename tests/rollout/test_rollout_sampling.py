"""Sampling draws from the distribution that transformers' own filters leave, and from nothing else.

Each filter is computed in several ways (candidates, histogram, bisection); they are compared with one full stable sort.
"""

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
from katds.rollout import sampling as module
from katds.rollout.sampling import Drawn, Sampling, sample_step

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
    return sample_step(logits, counter.uniforms(keys, counters), sampling, 0).tokens_S


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocabulary", [30, 2048, 4099])
@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_a_row_does_not_know_its_neighbours(sampling: Sampling, vocabulary: int, threads: int) -> None:
    """Bit for bit, the reported best included, whatever its place and the size of the batch."""
    logits, u = random_logits(40, vocabulary), torch.rand(40, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))

    def fields(drawn: Drawn) -> list[torch.Tensor]:
        assert drawn.top_ids_SK is not None and drawn.top_logprobs_SK is not None
        return [drawn.tokens_S, drawn.top_ids_SK, drawn.top_logprobs_SK]

    torch.set_num_threads(threads)
    try:
        together = fields(sample_step(logits, u, sampling, 16))
        shuffled = fields(sample_step(logits[order], u[order], sampling, 16))
        alone = [fields(sample_step(logits[i : i + 1], u[i : i + 1], sampling, 16)) for i in range(40)]
    finally:
        torch.set_num_threads(1)
    for i, field in enumerate(together):
        assert torch.equal(shuffled[i], field[order])
        assert torch.equal(torch.cat([row[i] for row in alone]), field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("vocabulary", "k"), [(24, 16), (24, 30), (5000, 64)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.9), Sampling(temperature=0.0)])
def test_the_best_are_those_of_the_unfiltered_log_softmax(
    sampling: Sampling, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    logits = (random_logits(20, vocabulary) * 3).to(dtype)
    logits[3, 5:] = -torch.inf
    drawn = sample_step(logits, torch.full((20,), 0.5), sampling, k)
    expected = (logits.double() / sampling.scale).log_softmax(-1)
    assert drawn.top_logprobs_SK is not None and drawn.top_ids_SK is not None
    assert drawn.top_logprobs_SK.dtype == torch.float32 and drawn.top_ids_SK.dtype == torch.int64
    plain = (logits.float() / sampling.scale).log_softmax(-1)  # errs by up to an ulp of the logits, here 1e-5
    allowed = 2 * (plain - expected).nan_to_num().abs().amax().item() + 1e-6
    close = {"rtol": 0, "atol": allowed}
    best = expected.topk(min(k, vocabulary)).values
    torch.testing.assert_close(drawn.top_logprobs_SK.double(), expected.gather(-1, drawn.top_ids_SK), **close)
    torch.testing.assert_close(drawn.top_logprobs_SK.sort(-1, descending=True).values.double(), best, **close)
    assert sample_step(logits, torch.full((20,), 0.5), sampling, 0).top_ids_SK is None


def kinds_of_rows(vocabulary: int) -> torch.Tensor:
    """Probabilities from flat to peaked, with ties, with equal values throughout, with impossible tokens."""
    logits = random_logits(60, vocabulary, seed=vocabulary) * 0.7
    tied = random_logits(60, vocabulary, seed=1).bfloat16().float().round(decimals=1)
    impossible = logits.masked_fill(random_logits(60, vocabulary, seed=2) < 0, -torch.inf)
    impossible[:, 0] = 0.0
    return torch.cat([logits, tied, impossible, torch.zeros(2, vocabulary)]).softmax(-1)


def kept_by_sort(probabilities: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The definition: sort, equal probabilities by token; drop; put back."""
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered * module._keep(ordered, sampling)
    return torch.zeros_like(probabilities).scatter(-1, ids, kept)


@pytest.mark.parametrize("vocabulary", [7, 300, 2048, 4099])
@pytest.mark.parametrize(
    "sampling",
    [s for s in FILTERS if s.top_k or s.top_p < 1]
    + [Sampling(top_p=p) for p in (0.1, 0.25, 0.5, 0.99, 1 - 1e-9)]
    + [Sampling(top_p=0.9, min_p=0.05), Sampling(top_k=64), Sampling(top_k=200, top_p=0.5)],
)
def test_every_way_keeps_what_a_full_sort_keeps(
    sampling: Sampling, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities = kinds_of_rows(vocabulary)
    expected = kept_by_sort(probabilities, sampling)
    assert torch.equal(module._kept_by_edge(probabilities, sampling), expected), "histogram"
    for count in (1, 8, 64, vocabulary):
        ids = probabilities.topk(min(count, vocabulary)).indices
        assert torch.equal(module._kept_by_candidates(probabilities, ids, sampling), expected), count
    assert torch.equal(module._kept_by_candidates(probabilities, None, sampling), expected)
    monkeypatch.setattr(module, "_edge_by_histogram", module._edge_by_bisection)
    assert torch.equal(module._kept_by_edge(probabilities, sampling), expected), "bisection"
    assert torch.equal(module._kept_by_candidates(probabilities, None, sampling), expected)


@pytest.mark.parametrize("vocabulary", [300, 4099])
@pytest.mark.parametrize("sampling", [s for s in FILTERS if s.filtered and s.top_p > 0.1])
def test_wide_kept_sets_are_those_of_transformers(sampling: Sampling, vocabulary: int) -> None:
    """Its float64 arithmetic and ours of float32 may differ in tokens that lie within a rounding error of an edge."""
    logits = random_logits(60, vocabulary, seed=3)
    expected = filtered(logits.double(), sampling)
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k or sampling.top_p < 1:
        kept = module._kept_by_candidates(probabilities, None, sampling)
    else:
        kept = module._above_min_p(probabilities, probabilities, sampling.min_p)
    wrong = (kept > 0) != (expected > 1e-30)
    assert wrong.sum() <= 2 and (probabilities[wrong] < 1e-2).all()


@pytest.mark.parametrize("vocabulary", [20, 1009, 2048, 151936])
def test_a_comb_of_numbers_draws_each_token_as_often_as_it_is_probable(vocabulary: int) -> None:
    """Sharper than a chi-square: tokens hold an interval of u each, so that a comb counts its length to one tooth at
    either end. At 151,936 tokens most probabilities are below one tooth, so groups of neighbours are compared, too."""
    teeth = 4096
    u = (torch.arange(teeth) + 0.5) / teeth
    for row in random_logits(3, vocabulary, seed=5) * 0.3:
        probabilities = row.softmax(-1)
        drawn = torch.cat([module._invert(probabilities.expand(len(part), -1), part) for part in u.split(256)])
        share = torch.bincount(drawn, minlength=vocabulary).double() / teeth
        expected = row.double().softmax(-1)
        assert (share - expected).abs().max() <= 2 / teeth
        columns = vocabulary // module._rows(vocabulary)
        by_column = (share - expected).view(-1, columns).sum(0)
        assert by_column.abs().max() <= 2 / teeth and by_column.cumsum(0).abs().max() <= 2 / teeth


@pytest.mark.parametrize("vocabulary", [2048, 4099, 151936])
@pytest.mark.parametrize("share", [0.5, 0.999])
@pytest.mark.parametrize("u", [2.0**-24, 0.5, 1 - 2.0**-24])
def test_an_impossible_token_is_never_drawn_from_a_large_vocabulary(vocabulary: int, share: float, u: float) -> None:
    """Also where the possible ones are hardly so, and with extreme numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(16, vocabulary, generator=generator)
    weights *= torch.rand(16, vocabulary, generator=generator) > share
    weights[:, vocabulary // 3] = 0.5
    for scale in (1.0, 1e-6):
        probabilities = weights / weights.sum(-1, keepdim=True) * scale
        drawn = module._invert(probabilities, torch.full((16,), u))
        assert (probabilities.gather(-1, drawn[:, None]) > 0).all()


def test_a_number_on_the_edge_of_an_interval_belongs_to_the_next_possible_token() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.0, 0.25, 0.5, 0.0]).expand(5, -1)
    u = torch.tensor([0.0, 0.125, 0.25, 0.5, 1 - 2.0**-50], dtype=torch.float64)
    index, rest = module._locate(weights, u[:, None])
    assert index.flatten().tolist() == [1, 1, 4, 5, 5]
    assert rest[:4].flatten().tolist() == [0.0, 0.5, 0.0, 0.0] and 0.99 < rest[4] < 1


@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_a_row_of_nan_gets_a_token_and_leaves_the_others_theirs(sampling: Sampling) -> None:
    """An index out of bounds would end a process on CUDA, before the trainer can say that its loss is not finite."""
    logits, u = random_logits(3, 2048), torch.tensor([0.1, 0.999, 0.5])
    expected = sample_step(logits, u, sampling, 16).tokens_S
    for broken in (torch.nan, torch.inf, -torch.inf):
        logits[1] = broken
        drawn = sample_step(logits, u, sampling, 16).tokens_S
        assert drawn[[0, 2]].tolist() == expected[[0, 2]].tolist() and 0 <= drawn[1] < 2048


@pytest.mark.parametrize("sampling", [*FILTERS, Sampling(temperature=0.0)])
def test_nothing_waits_for_the_device(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CUDA runs on tensors without data, which can be asked for their shapes only."""
    monkeypatch.setattr(module, "_edge_by_histogram", module._edge_by_bisection)
    monkeypatch.setattr(module, "_kept_by_candidates", lambda rows, ids, sampling: module._kept_by_edge(rows, sampling))
    drawn = sample_step(torch.empty(3, 2048, device="meta"), torch.empty(3, device="meta"), sampling, 16)
    assert drawn.tokens_S.shape == (3,) and drawn.top_ids_SK is not None and drawn.top_ids_SK.shape == (3, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", FILTERS, ids=NAMES)
def test_a_cuda_graph_draws_what_the_cpu_draws(sampling: Sampling) -> None:
    logits, u = random_logits(200, 2048), torch.rand(200, generator=torch.Generator().manual_seed(0))
    expected = sample_step(logits, u, sampling, 16)
    logits, u = logits.cuda(), u.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sample_step(logits, u, sampling, 16)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample_step(logits, u, sampling, 16)
    graph.replay()
    assert (drawn.tokens_S.cpu() == expected.tokens_S).float().mean() >= 0.99  # exp differs in its last bits
    assert drawn.top_logprobs_SK is not None and expected.top_logprobs_SK is not None
    a, b = (x.top_logprobs_SK.cpu().sort(-1).values for x in (drawn, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
