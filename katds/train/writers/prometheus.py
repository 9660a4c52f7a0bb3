"""Prometheus: the newest step as a text file for node_exporter's textfile collector."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from katds.errors import ConfigError
from katds.train.writers.base import Watched, Writer

# Tags of these groups have names of rules, phases and benchmarks: they become label values. Group -> metric, label, help.
LABELLED = {
    "stop": ("katds_stop_share", "reason", "Share of the step's rollouts that ended for this reason"),
    "time": (
        "katds_phase_seconds",
        "phase",
        "Seconds of the step's phases on rank 0; those with a slash are parts of others",
    ),
    "eval": ("katds_evaluation", "score", "Scores of the last evaluation"),
}


class PrometheusWriter(Writer):
    """Writes `katds-NAME.prom` anew after each step. It stays when the run ends or dies: `katds_written_timestamp_seconds` tells how old
    it is."""

    @staticmethod
    def check(folder: Path) -> None:
        """Raises ConfigError where nothing could be written."""
        if find_spec("prometheus_client") is None:
            raise ConfigError(
                f"watch.prometheus is {folder}, but prometheus-client is not installed. Run pip install 'katds[prometheus]'."
            )
        if not folder.is_dir():
            raise ConfigError(
                f"watch.prometheus: {folder} is no folder. Give the one that node_exporter reads (--collector.textfile.directory)."
            )

    def __init__(self, folder: Path, run: Watched) -> None:
        self._file = folder / f"katds-{run.name}.prom"
        self._run = run
        self._step: tuple[int, dict[str, float]] | None = None
        self._evaluated: dict[str, float] = {}
        self._finished = False

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        if all(tag.startswith("eval/") for tag in record):
            self._evaluated = dict(record)
        else:
            self._step = step, dict(record)
        self._write()

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._finished = True
        self._write()

    def _write(self) -> None:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

        registry = CollectorRegistry()  # a new one: what a step does not have must not stay
        gauges: dict[str, Gauge] = {}

        def show(name: str, text: str, value: float, **labels: str) -> None:
            if name not in gauges:
                gauges[name] = Gauge(name, text, ["run", *labels], registry=registry)
            gauges[name].labels(run=self._run.name, **labels).set(value)

        step, record = self._step or (self._run.start - 1, {})
        show("katds_step", "Steps done", step + 1)
        show("katds_steps", "Steps of the whole run", self._run.steps)
        show("katds_finished", "1: the run has come to its end", self._finished)
        show("katds_written_timestamp_seconds", "When this was written, unix time", time.time())
        for tag, value in (record | self._evaluated).items():
            group, _, rest = tag.partition("/")
            if group in LABELLED:
                name, label, text = LABELLED[group]
                show(name, text, value, **{label: rest})
            else:
                show(metric_name(tag), f"{tag} of metrics.jsonl", value)
        write_to_textfile(str(self._file), registry)


def metric_name(tag: str) -> str:
    """rollout/saved_fraction -> katds_rollout_saved_fraction; what a name may not hold becomes an underscore."""
    return "katds_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag)
