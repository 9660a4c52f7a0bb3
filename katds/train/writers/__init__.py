"""Where a run is written while it trains: its own folder and TensorBoard always, trackers where the recipe's section `watch` names them.

A new tracker is one file, one line in `TRACKERS`, and its setting in `katds.sections.WatchConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from katds.errors import ConfigError
from katds.sections import WatchConfig
from katds.train.writers.apart import Apart
from katds.train.writers.base import Watched, Writer
from katds.train.writers.jsonl import JsonlWriter
from katds.train.writers.mlflow import MlflowWriter
from katds.train.writers.prometheus import PrometheusWriter
from katds.train.writers.tensorboard import TensorboardWriter
from katds.train.writers.wandb import WandbWriter

# By setting of `watch`: made of its value and the run; `check(value)` raises ConfigError for what can be known before models are loaded.
TRACKERS: dict[str, Any] = {"wandb": WandbWriter, "mlflow": MlflowWriter, "prometheus": PrometheusWriter}


def check_trackers(watch: WatchConfig) -> None:
    """Raises ConfigError: a package or a key is missing. Imports only what is asked for."""
    for name, value in _asked(watch):
        TRACKERS[name].check(value)


def folder_writers(run: Watched) -> list[Writer]:
    """Those of every run. What an earlier process wrote from `run.start` on is dropped."""
    records = JsonlWriter(run)
    return [records, TensorboardWriter(run, records.evaluations)]


def open_writers(watch: WatchConfig, run: Watched, say: Callable[[str], None]) -> list[Writer]:
    """All of a run, for rank 0. Raises ConfigError where a tracker cannot be reached; later that is a warning by `say`."""
    trackers: list[Writer] = []
    try:
        for name, value in _asked(watch):
            trackers.append(Apart(f"watch.{name}", TRACKERS[name](value, run), run, say))
    except ConfigError:
        for opened in trackers:
            opened.close(failed=True)
        raise
    return [*folder_writers(run), *trackers]


def _asked(watch: WatchConfig) -> list[tuple[str, Any]]:
    values = [(name, getattr(watch, name)) for name in TRACKERS]
    return [(name, value) for name, value in values if value is not None]
