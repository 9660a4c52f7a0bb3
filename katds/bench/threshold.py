"""What a stop rule over many ranks costs: the engine's reduction in each round, and the reductions at the end of a step.

Measured: the real functions on real ranks (gloo, this machine). Modelled: what a processor does with the data of more ranks is measured
in one process, where a stand-in answers for the others; the network is hops x (latency + bytes / bandwidth), both taken from two ranks,
and log2(ranks) hops (`katds.parallel.reduce`). Every rank is taken to contribute what this one does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from katds.bench.arguments import positive
from katds.bench.report import Result
from katds.errors import ConfigError

if TYPE_CHECKING:
    from katds.core.collective import Collective
    from katds.core.stop.kat import KatRule

HELP = "the collectives of the control flow and the threshold, on 1 to 1024 ranks"
SMOKE = ["--ranks", "--modelled", "8", "--rollouts", "4", "--repetitions", "3"]
PARTS = (
    "round",
    "finish_step",
    "step_sums",
    "lengths",
    "survey",
)  # one reduction each; all but the first once per step
STREAM_BYTES = 1 << 20  # of the reduction that shows the bandwidth
T = TypeVar("T")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=positive, nargs="*", default=[1, 2, 3, 4], help="to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--modelled", type=positive, nargs="*", default=[8, 16, 64, 256, 1024], help="(default: %(default)s)"
    )
    parser.add_argument("--rollouts", type=positive, default=32, help="per rank and step (default: %(default)s)")
    parser.add_argument("--repetitions", type=positive, default=50, help="(default: %(default)s)")
    parser.add_argument(
        "--latency-us", type=float, help="of one message, for the model (default: measured on two ranks)"
    )
    # Of launch/recipes/demo.yaml on two ranks, two CPU cores, once KAT ends rollouts: 23 rounds in 0.53 of 0.75 seconds.
    parser.add_argument("--round-seconds", type=float, default=0.023, help="to compare with (default: the demo's)")
    parser.add_argument("--step-seconds", type=float, default=0.75, help="to compare with (default: the demo's)")


def run(options: argparse.Namespace) -> Result:
    from katds.bench.stand_in import StandIn

    if min(options.round_seconds, options.step_seconds) <= 0:
        raise ConfigError("--round-seconds and --step-seconds have to be above 0: shares of them are shown.")
    measured = {ranks: _on_ranks(ranks, options.rollouts, options.repetitions) for ranks in options.ranks}
    network = _network(measured, options)
    rows = [_row("measured", ranks, _medians(seconds), None, options) for ranks, seconds in measured.items()]
    samples: list[dict[str, Any]] = [{"ranks": ranks, **seconds} for ranks, seconds in measured.items()]
    for ranks in options.modelled:
        seconds = measure(StandIn(ranks), options.rollouts, max(3, options.repetitions // 10), time.process_time)
        rows.append(_row("modelled", ranks, _medians(seconds), network, options))
        samples.append({"ranks": ranks, "processor_only": True, **seconds})
    return Result(
        "threshold", "what do the control flow's and the threshold's collectives cost?", rows, samples,
        {
            "rollouts": options.rollouts, "repetitions": options.repetitions, "latency_seconds": network.latency,
            "bytes_per_second": network.bandwidth, "round_seconds": options.round_seconds,
            "step_seconds": options.step_seconds,
        },
        [
            "microseconds; medians; of several ranks the slowest. More ranks than cores wait for each other's turn",
            f"modelled rows are no measurement: processor time + log2(ranks) hops x ({1e6 * network.latency:.0f} us + bytes / "
            f"{network.bandwidth / 1e9:.2f} GB/s) ({network.source})",
            "admit: the first round's deal of all rollouts to empty slots; no communication",
            f"shares: of a round of {options.round_seconds} s and of a step of {options.step_seconds} s, as the demo's; "
            "a round of a large model takes a second and more",
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """latency [s] of a message between neighbours, bandwidth [bytes/s] of a link."""

    latency: float
    bandwidth: float
    source: str

    def seconds(self, payload: float, ranks: int) -> float:
        """Of a reduction of `payload` bytes over `ranks` by doubling; two hops more where they are no power of two."""
        hops = ranks.bit_length() - 1 + (2 if ranks & (ranks - 1) else 0)
        return hops * (self.latency + payload / self.bandwidth)


def measure(
    collective: Collective, rollouts: int, repetitions: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Collective: seconds of every part, in turn; and of `admit`, once. All ranks start a part together."""
    import torch

    from katds.core.lengths import collect
    from katds.core.types import EOS, Prompt, Rollout, RolloutBatch, RolloutRequest
    from katds.rollout.slots import assign
    from katds.train.share import survey
    from katds.train.statistics import step_sums

    count = rollouts * collective.size
    requests = [RolloutRequest(i, Prompt(i, (0,)), 64) for i in range(count)]
    own = requests[collective.rank :: collective.size]
    batch = RolloutBatch([Rollout(r, [0] * 64, 32, EOS, None, [0.1] * 64) for r in own], {})
    stream = torch.zeros(STREAM_BYTES // 8, dtype=torch.float64)
    seconds: dict[str, list[float]] = {}
    for _ in range(repetitions + 1):
        rule = _judged(own)
        parts: dict[str, Callable[[], Any]] = {
            "round": lambda: control_round(collective),
            "finish_step": lambda rule=rule: rule.finish_step(collective, 0, count),  # type: ignore[misc]
            "step_sums": lambda rule=rule: step_sums(batch.rollouts, 64, None, rule.reasons, collective),  # type: ignore[misc]
            "lengths": lambda rule=rule: collect(batch.rollouts, requests, rule.reasons, collective),  # type: ignore[misc]
            "survey": lambda: survey(batch, requests, collective),
            "stream": lambda: collective.sum(stream),
        }
        for name, part in parts.items():
            seconds.setdefault(name, []).append(_timed(part, collective, now))
    admit = _timed(lambda: assign([rollouts] * collective.size, [0] * collective.size, range(count)), collective, now)
    return {name: values[1:] for name, values in seconds.items()} | {"admit": [admit]}


def control_round(collective: Collective) -> list[list[int]]:
    """Collective: the reduction of `RolloutEngine._admit`, and its deal where every slot is taken."""
    import torch

    from katds.rollout.slots import assign

    report = torch.zeros(3, collective.size, dtype=torch.int64)
    report[1, collective.rank] = 64
    free, live, _ = collective.sum(report).tolist()
    return assign(free, live, range(64))


def _judged(own: Sequence[Any]) -> KatRule:
    """A rule that has seen this rank's rollouts of a step, with the published queue of 4096 minima."""
    from katds.core.stop.kat import KatRule
    from katds.core.threshold import AdaptiveThreshold

    threshold = AdaptiveThreshold(0.3, 4096, 1, 0)
    threshold.push([0.1 + i % 97 / 97 for i in range(4096)])
    rule = KatRule(window=4, stride=4, persistence=1, min_kept=0, threshold=threshold, source="all")
    for request in own:
        rule.begin(request)
        rule.observe(request, [0] * 4, [0.1 + request.id % 89 / 89] * 4)
        rule.end(request, terminated=False)
    return rule


def _timed(part: Callable[[], Any], collective: Collective, now: Callable[[], float]) -> float:
    collective.barrier()
    start = now()
    part()
    return now() - start


def _on_ranks(ranks: int, rollouts: int, repetitions: int) -> dict[str, list[float]]:
    """`measure` on real ranks; of each repetition the slowest rank's time."""
    from katds.bench.ranks import on_ranks

    found = on_ranks(ranks, _measure_here, rollouts, repetitions)
    return {name: [max(times) for times in zip(*(rank[name] for rank in found), strict=True)] for name in found[0]}


def _measure_here(rollouts: int, repetitions: int) -> dict[str, list[float]]:
    from katds.parallel.world import start_world

    return measure(start_world(timeout_seconds=120.0).collective, rollouts, repetitions)


def _network(measured: dict[int, dict[str, list[float]]], options: argparse.Namespace) -> Network:
    """From two ranks, less what a processor does there; where they were not measured, round figures stand in.

    The least of the repetitions counts: what other programs on the machine add is not the network's.
    """
    found = Network(25e-6, 1e9, "assumed")
    from katds.bench.stand_in import StandIn

    if 2 in measured:
        alone = measure(StandIn(2), options.rollouts, 5)
        hop, stream = (min(measured[2][part]) - min(alone[part]) for part in ("round", "stream"))
        found = Network(hop, STREAM_BYTES / (stream - hop), "both from two ranks here")
    return (
        found if options.latency_us is None else Network(options.latency_us * 1e-6, found.bandwidth, "latency as told")
    )


def _row(
    kind: str, ranks: int, own: dict[str, float], network: Network | None, options: argparse.Namespace
) -> dict[str, Any]:
    """`own`: seconds of the parts, to which a modelled network's are added."""
    rollouts = options.rollouts * ranks
    payload = {"round": 16 * ranks, "finish_step": 16 * rollouts, "step_sums": 0}
    payload |= {"lengths": 32 * rollouts, "survey": 32 * rollouts}
    wire = dict.fromkeys(PARTS, 0.0)
    if network is not None:
        wire = {part: network.seconds(payload[part], ranks) for part in PARTS}
    total = {part: own[part] + wire[part] for part in PARTS}
    step = sum(total[part] for part in PARTS[1:])
    row: dict[str, Any] = {"ranks": ranks, "how": kind} | {f"{part} us": round(1e6 * total[part], 1) for part in PARTS}
    row |= {"% of round": 100 * total["round"] / options.round_seconds, "% of step": 100 * step / options.step_seconds}
    row |= {"KiB a step": sum(payload.values()) / 1024, "admit ms": 1e3 * own["admit"]}
    if network is not None:
        row |= {"processor us a step": round(1e6 * sum(own[part] for part in PARTS[1:]), 1)}
    return row


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {part: statistics.median(values) for part, values in seconds.items()}
