"""The packing and threshold benchmarks: toy runs are sane, every contender trains every rollout once, stand-ins tell the truth."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from messages import refused
from ranks import run_ranks

from katds.bench import packing, threshold
from katds.bench.lengths import LENGTHS
from katds.bench.packing import Batches, Job, differencing, draw, measure
from katds.bench.report import Result
from katds.bench.stand_in import StandIn
from katds.core.collective import Solo
from katds.core.packing import DEFAULT_ATTENTION_WEIGHT, Plan, imbalance
from katds.core.stop.simple import NeverRule
from katds.parallel.world import ProcessCollective
from katds.rollout.engine import RolloutEngine
from katds.rollout.sampling import Sampling
from katds.rollout.sizes import EngineSettings
from katds.rollout.slots import Slots


def toy(bench: ModuleType, *more: str) -> Result:
    parser = argparse.ArgumentParser()
    bench.options(parser)
    result = bench.run(parser.parse_args([*bench.SMOKE, *more]))
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_contender_keeps_every_rollout_once(name: str, world: int) -> None:
    job = draw(name, world, rollouts=11, budget=2.5, weight=0.0, seed=world)
    for title, make in packing.contenders(weight=1e-3).items():
        made = make(job)
        assert len(made.of_ranks) == world, title
        assert sorted(i for rank in made.of_ranks for batch in rank for i in batch) == list(range(11 * world)), title
        # An even number of micro-batches that ignores the budget is what verl does.
        assert measure(job, made)["largest"] <= 1 or title == "ranks balanced (as verl)", title


def test_waiting_and_padding_by_hand() -> None:
    job = Job([4, 2, 3, 1], [0, 0, 1, 1], world=2, longest=4, budget=8, weight=0.0)
    packed = measure(job, Batches([[[0], [1]], [[2, 3]]]))  # rounds 4 | 4 and 2 | nothing
    assert packed["padding"] == 0 and packed["moved"] == 0 and packed["rounds"] == 2
    assert packed["wait"] == packed["x ideal"] - 1 == pytest.approx(6 / 5 - 1)
    padded = measure(job, Batches([[[0, 1]], [[2, 3]]], padded=True))  # 8 and 6 tokens for 10
    assert padded["padding"] == pytest.approx(4 / 14)
    assert padded["wait"] == pytest.approx(8 / 7 - 1) and padded["x ideal"] == pytest.approx(8 / 5)
    assert measure(job, Batches([[[2, 1]], [[0, 3]]]))["moved"] == pytest.approx(7 / 10)


@pytest.mark.parametrize("name", LENGTHS)
def test_the_plan_waits_little_on_64_ranks(name: str) -> None:
    job = draw(name, 64, rollouts=32, budget=4.0, weight=DEFAULT_ATTENTION_WEIGHT, seed=7)
    made = packing.contenders(job.weight)["katds"](job)
    found = measure(job, made)
    assert found["wait"] == pytest.approx(imbalance(Plan(list(made.of_ranks)), job.lengths))
    assert packing.bound(job) <= found["x ideal"] <= 1.03


def test_differencing_splits_evenly() -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    # The textbook example: the method leaves 16 and 14, greedy 17 and 13.
    assert sorted(sum(costs[i] for i in part) for part in differencing(costs, range(5), 2)) == [14, 16]
    assert [len(part) for part in differencing(costs, range(4), 2, equal_counts=True)] == [2, 2]
    assert differencing(costs, [], 3) == [[], [], []]


def test_lengths_are_within_the_limit_and_repeat() -> None:
    for lengths in LENGTHS.values():
        drawn = lengths.draw(2000, seed=3)
        assert drawn == lengths.draw(2000, seed=3) != lengths.draw(2000, seed=4)
        assert min(drawn) >= 1 and lengths.longest * 0.9 < max(drawn) <= lengths.longest


def test_packing_runs() -> None:
    result = toy(packing, "--weight", "1e-3")
    assert {row["plan"] for row in result.rows} == set(packing.contenders(1e-3))
    assert all(row["x ideal"] >= row["bound"] >= 1 and 0 <= row["padding %"] < 100 for row in result.rows)
    assert len(result.samples) == len(result.rows)  # one draw


def test_what_cannot_be_compared_with_is_refused_before_the_measurement() -> None:
    refused(lambda: toy(packing, "--budget", "0.5"), "--budget is 0.5")
    refused(lambda: toy(threshold, "--round-seconds", "0"), "--round-seconds")
    refused(lambda: toy(threshold, "--step-seconds", "-1"), "--step-seconds")


def test_threshold_runs() -> None:
    (row,) = toy(threshold).rows
    assert row["ranks"] == 8 and row["how"] == "modelled"
    assert row["round us"] > 3 * 25  # hops at the assumed latency


def test_a_reduction_takes_as_many_hops_as_doubling_does() -> None:
    network = threshold.Network(1.0, 8.0, "")
    assert [network.seconds(0, ranks) for ranks in (1, 2, 3, 4, 6, 8, 1024)] == [0, 1, 3, 2, 4, 3, 10]
    assert network.seconds(16, 4) == 2 * (1 + 2)


def test_latency_and_bandwidth_are_those_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"round": [1.0, 0.5, 4.0], "stream": [2.0, 1.0]}  # what a processor does by itself
    monkeypatch.setattr(threshold, "measure", lambda *arguments: alone)
    measured = {2: {"round": [9.0, 2.5, 3.0], "stream": [7.0, 50.0]}, 4: {"round": [0.0], "stream": [0.0]}}
    parser = argparse.ArgumentParser()
    threshold.options(parser)
    found = threshold._network(measured, parser.parse_args([]))
    assert found.latency == 2.5 - 0.5 and found.bandwidth == threshold.STREAM_BYTES / (7.0 - 1.0 - 2.0)
    given = threshold._network(measured, parser.parse_args(["--latency-us", "7"]))
    assert given.latency == pytest.approx(7e-6) and given.bandwidth == found.bandwidth
    assert threshold._network({}, parser.parse_args([])).source == "assumed"


def test_a_modelled_row_adds_the_network_to_the_processor() -> None:
    parser = argparse.ArgumentParser()
    threshold.options(parser)
    options = parser.parse_args(["--rollouts", "2", "--round-seconds", "10", "--step-seconds", "100"])
    own = dict.fromkeys((*threshold.PARTS, "admit"), 1.0)
    row = threshold._row("modelled", 4, own, threshold.Network(1.0, 16.0, ""), options)
    # Two hops of 1 s and 16 bytes a second: 64 bytes in a round; 128, none, 256 and 256 in the step's four.
    assert [row[f"{part} us"] for part in threshold.PARTS] == [1e6 * s for s in (11.0, 19.0, 3.0, 35.0, 35.0)]
    assert row["% of round"] == pytest.approx(110) and row["% of step"] == pytest.approx(92)
    alone = threshold._row("measured", 4, own, None, options)
    assert [alone[f"{part} us"] for part in threshold.PARTS] == [1e6] * 5


class Watched(Solo):
    """Says what was reduced."""

    def __init__(self) -> None:
        self.rank, self.size = 1, 3
        self.seen: list[tuple[torch.Size, torch.dtype]] = []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.seen.append((values.shape, values.dtype))
        return values


def test_the_round_that_is_timed_reduces_what_the_engines_does() -> None:
    timed, real = Watched(), Watched()
    threshold.control_round(timed)
    settings = EngineSettings(2, 4, (), Sampling(), 1, 0, torch.device("cpu"))
    student: Any = None
    engine = RolloutEngine(student, (), NeverRule(), frozenset(), real, settings, lambda name: nullcontext())
    engine._admit(Slots(2), [])
    assert timed.seen == real.seen and len(real.seen) == 1


def whole_step(rank_collective: ProcessCollective | None = None) -> dict[str, int]:
    collective = rank_collective or ProcessCollective(torch.device("cpu"))
    return {part: len(seconds) for part, seconds in threshold.measure(collective, 3, 2).items()}


def test_real_ranks_are_measured() -> None:
    expected = {**dict.fromkeys(threshold.PARTS, 2), "stream": 2, "admit": 1}
    assert run_ranks(2, whole_step) == [expected, expected]


def sums(own: list[list[float]]) -> list[list[float]]:
    collective = ProcessCollective(torch.device("cpu"))
    table = torch.zeros(2, 6)
    table[:, collective.rank :: 3] = torch.tensor(own)
    return collective.sum(table).tolist()  # type: ignore[no-any-return]


def test_the_stand_in_answers_as_equal_ranks_would() -> None:
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table = torch.zeros(2, 6)
    table[:, ::3] = own
    assert run_ranks(3, sums, own.tolist()) == [StandIn(3).sum(table).tolist()] * 3
