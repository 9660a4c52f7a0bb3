"""What is told of a run while it trains: a console line and a progress bar per step here, all else by writers and the timeline.

Only rank 0 writes. Totals over the run live here, and travel with checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from tqdm import tqdm

from katds.core.collective import Collective
from katds.core.lengths import StepLengths
from katds.core.types import Rollout
from katds.train.clock import Clock
from katds.train.memory import peak_memory_bytes
from katds.train.samples import Sample
from katds.train.statistics import Sums, add, saved_fraction
from katds.train.timeline import Timeline
from katds.train.writers import Writer

STEP_PHASES = ("rollout", "learn", "report")  # together one training step; evaluation and checkpoints are counted apart
_LEARNED = {
    "loss": "loss/total",
    "kl": "loss/kl",
    "entropy": "loss/entropy",
    "lr": "train/lr",
    "gradient_norm": "train/gradient_norm",
}


class Monitor:
    """Keeps the totals, speaks on the console and tells the writers.

    Args:
        start: first step of this process.
        describe: a rollout as it is shown.
        rollout_samples: of a step that are shown.
        writers: empty on all ranks but 0.
    """

    def __init__(
        self, timeline: Timeline, collective: Collective, device: torch.device, start: int, steps: int,
        describe: Callable[[Rollout], Sample], rollout_samples: int, writers: Sequence[Writer],
    ) -> None:  # fmt: skip
        self.timeline = timeline
        self.clock = Clock(timeline.heard)
        self.totals: Sums = {}
        self.active_totals: Sums = {}  # since the rule ended its first rollout
        self.seconds: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._collective, self._device, self._is_main = collective, device, collective.rank == 0
        self._steps, self._describe, self._samples, self._writers = steps, describe, rollout_samples, writers
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=None if self._is_main else True,
            leave=False,
            dynamic_ncols=True,
        )

    def begin(self, step: int) -> None:
        """Collective: a step begins, and the one before is over with all that followed it."""
        self.timeline.begin(step)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.clock(name)

    def step(
        self,
        step: int,
        sums: Sums,
        metrics: Mapping[str, float],
        learned: Mapping[str, float],
        samples: Sequence[Rollout],
    ) -> None:
        """Collective: records one finished step."""
        add(
            self.totals, {**sums, "learned": learned.get("tokens", 0.0)}
        )  # fewer than kept: holes, and what an objective leaves out
        if self.active_totals or sums["rollouts"] > sums["stop/eos"] + sums["stop/length"]:
            add(self.active_totals, sums)
        seconds = self._take_seconds()
        wall = sum(value for key, value in seconds.items() if key in STEP_PHASES)
        record = {
            _LEARNED.get(key, key if "/" in key else f"train/{key}"): value for key, value in learned.items()
        } | dict(metrics)
        record |= {f"time/{key}": value for key, value in seconds.items()}
        record["throughput/rollout_tokens_per_second"] = sums["tokens"] / wall if wall else 0.0
        record["memory/peak_bytes"] = peak_memory_bytes(self._collective, self._device)
        if (saved := saved_fraction(self.totals)) is not None:
            record["rollout/saved_fraction_total"] = saved
        self.write(step, record)
        self.last = record
        if self._is_main:
            self.say(_line(step + 1, self._steps, record, wall))
            self._show(step, samples)
        self._bar.update()

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Scalars of a step."""
        for writer in self._writers:
            writer.scalars(step, record)

    def lengths(self, step: int, record: StepLengths) -> None:
        """How long the rollouts of a step were."""
        for writer in self._writers:
            writer.lengths(step, record)

    def _show(self, step: int, samples: Sequence[Rollout]) -> None:
        if not self._samples:
            return
        # Audit rollouts first: they show what lies behind the cut.
        chosen = sorted(samples, key=lambda r: (not r.request.audit, r.id))[: self._samples]
        shown = [self._describe(rollout) for rollout in chosen]
        for writer in self._writers:
            writer.samples(step, shown)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Records an evaluation of the student after `step` steps."""
        self._take_seconds()  # or they would count as the next step's
        self.write(step, {f"eval/{key}": value for key, value in scores.items()})
        if self._is_main:
            shown = {key: value for key, value in scores.items() if not key.endswith(("_low", "_high"))}
            self.say(
                f"evaluation after {step} steps: " + "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
            )

    def _take_seconds(self) -> Sums:
        seconds = self.clock.take()
        add(self.seconds, seconds)
        return seconds

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": self.totals,
            "active_totals": self.active_totals,
            "seconds": self.seconds,
            "last": self.last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals, self.active_totals, self.seconds = (
            dict(state["totals"]),
            dict(state["active_totals"]),
            dict(state["seconds"]),
        )
        self.totals.setdefault("learned", self.totals.get("kept", 0.0))  # of a checkpoint from before it was counted
        self.last = dict(state["last"])

    def stop(self) -> None:
        """Collective: training is over, and the console is free."""
        self.timeline.end()
        self._take_seconds()
        self._bar.close()

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Collective. `summary` is of a run that came to its end."""
        self.stop()
        for writer in self._writers:
            if summary is not None:
                writer.summary(summary)
            writer.close()
        self._writers = ()

    @contextmanager
    def told_of_failure(self) -> Iterator[None]:
        """Around what an error may end: the writers are told before it goes on its way."""
        try:
            yield
        except BaseException as error:
            self.fail(isinstance(error, Exception))
            raise

    def fail(self, failed: bool = True) -> None:
        """This rank's run ends here, by an error unless not `failed`. Other ranks do what they may; a writer has some seconds."""
        writers, self._writers = self._writers, ()
        for writer in writers:
            with suppress(Exception):  # the error that is on its way says more
                writer.close(failed)

    def say(self, line: str) -> None:
        """One line on rank 0, above the progress bar."""
        if self._is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def _line(step: int, steps: int, record: Mapping[str, float], wall: float) -> str:
    """One aligned console line; what does not apply shows a dash."""

    def show(key: str, pattern: str) -> str:
        return pattern.format(record[key]) if key in record else "-".rjust(len(pattern.format(0.0)))

    width = len(str(steps))
    return (
        f"step {step:{width}d}/{steps}  loss {show('loss/total', '{:7.4f}')}  kl {show('rollout/kl_mean', '{:7.4f}')}"
        f"  length {show('rollout/length_mean', '{:6.1f}')}  kept {show('rollout/kept_mean', '{:6.1f}')}"
        f"  cut {show('rollout/terminated_fraction', '{:4.0%}')}  saved {show('rollout/saved_fraction_total', '{:4.0%}')}"
        f"  threshold {show('kat/threshold', '{:8.2e}')}  lr {show('train/lr', '{:8.2e}')}"
        f"  {show('throughput/rollout_tokens_per_second', '{:7.0f}')} tok/s  {wall:5.2f} s"
    )
