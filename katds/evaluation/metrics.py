"""Scores of an evaluation: avg@n, pass@k by its unbiased estimator, lengths, and bootstrap intervals over problems."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_DRAWN = 2**18  # numbers at a time


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    As a product of ratios below 1, so that no binomial overflows. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0, n - c - i) / (n - i)
    return 1.0 - all_wrong


def avg_at_k(n: int, c: int) -> float:
    """Share of right samples. Raises ValueError unless 0 <= c <= n and n >= 1."""
    if not (n >= 1 and 0 <= c <= n):
        raise ValueError(f"avg@n needs 0 <= c <= n and n >= 1; got n={n}, c={c}")
    return c / n


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded response."""

    correct: bool
    tokens: int
    finished: bool  # ended by an end token, not by its maximum length


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found."""

    problems: int
    samples: int  # per problem, the n of avg@n
    k: int
    average: Estimate
    passed: Estimate
    mean_tokens: float
    finished: float

    def metrics(self) -> dict[str, float]:
        """By name, without a prefix: avg@8, avg@8_low, avg@8_high, pass@4, ..., length_mean, finished."""
        named = {f"avg@{self.samples}": self.average, f"pass@{self.k}": self.passed}
        values: dict[str, float] = {}
        for name, estimate in named.items():
            values |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return values | {"length_mean": self.mean_tokens, "finished": self.finished}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of every benchmark, by name, and where there are several their average.

    `average` and `passed` are means over benchmarks, each with the same weight however many problems it has, as papers report
    "the average of four"; `k` differs between benchmarks, so that the names of these two have none.
    """

    scores: dict[str, Scores]
    average: Estimate
    passed: Estimate

    def metrics(self) -> dict[str, float]:
        """By name, without a prefix. A single benchmark without a name: its own metrics. Else NAME/avg@8, ..., and average/avg@k,
        average/pass@k, average/length_mean, average/finished."""
        if list(self.scores) == [""]:
            return self.scores[""].metrics()
        values = {f"{name}/{key}": value for name, each in self.scores.items() for key, value in each.metrics().items()}
        for name, estimate in (("average/avg@k", self.average), ("average/pass@k", self.passed)):
            values |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        every = list(self.scores.values())
        return values | {
            "average/length_mean": sum(each.mean_tokens for each in every) / len(every),
            "average/finished": sum(each.finished for each in every) / len(every),
        }


def evaluation_of(samples: Mapping[str, Mapping[int, Sequence[Sample]]], pass_at: Mapping[str, int]) -> Evaluation:
    """The scores of {benchmark: {problem: its samples}}, and their average. `pass_at` is each benchmark's k of pass@k.

    The average's interval resamples the problems of each benchmark on its own: the benchmarks are given, their problems are drawn.
    """
    scores, averages, passes = {}, [], []
    for name, by_problem in samples.items():
        found, k = [by_problem[i] for i in sorted(by_problem)], pass_at[name]
        # By the name: with one seed the errors of two benchmarks would rise and fall together.
        seed = zlib.crc32(name.encode())
        scores[name] = score(found, k, seed)
        averages.append(resampled_means(_averages(found), seed))
        passes.append(resampled_means(_passes(found, k), seed))
    every = list(scores.values())
    return Evaluation(
        scores,
        _estimate([each.average.mean for each in every], np.mean(averages, axis=0)),
        _estimate([each.passed.mean for each in every], np.mean(passes, axis=0)),
    )


def score(problems: Sequence[Sequence[Sample]], k: int, seed: int = 0) -> Scores:
    """Scores of the samples of each problem. Raises ValueError without problems or if they differ in sample count."""
    counts = sorted({len(samples) for samples in problems})
    if len(counts) != 1:
        raise ValueError(f"every problem needs the same number of samples; got {counts or 'no problems'}")
    everything = [sample for samples in problems for sample in samples]
    return Scores(
        problems=len(problems),
        samples=counts[0],
        k=k,
        average=bootstrap(_averages(problems), seed),
        passed=bootstrap(_passes(problems, k), seed),
        mean_tokens=sum(sample.tokens for sample in everything) / len(everything),
        finished=sum(sample.finished for sample in everything) / len(everything),
    )


def _averages(problems: Sequence[Sequence[Sample]]) -> list[float]:
    return [avg_at_k(len(samples), sum(sample.correct for sample in samples)) for samples in problems]


def _passes(problems: Sequence[Sequence[Sample]], k: int) -> list[float]:
    return [pass_at_k(len(samples), sum(sample.correct for sample in samples), k) for samples in problems]


def bootstrap(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean and 95% percentile interval of the mean over resampled problems; reproducible by its seed.

    Problems, not samples, are resampled: samples of one problem are not independent, and the question is how the score
    would be on other problems of the kind. One problem gives an interval of no width.
    """
    return _estimate(values, resampled_means(values, seed, resamples))


def resampled_means(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """The mean of each of so many resamples of `values`, drawn with replacement."""
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed)
    # Some resamples at a time: the whole [resamples, problems] matrix would be large for large evaluations.
    rows = max(1, _DRAWN // len(data))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([data[draws.integers(len(data), size=(size, len(data)))].mean(axis=1) for size in sizes])


def _estimate(values: Sequence[float], means: np.ndarray) -> Estimate:
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(np.mean(np.asarray(values, dtype=np.float64))), float(low), float(high))
