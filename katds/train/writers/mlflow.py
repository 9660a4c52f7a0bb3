"""MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from katds.errors import ConfigError, first_sentence
from katds.schema import flat
from katds.train.samples import Sample
from katds.train.writers.base import Watched, Writer
from katds.train.writers.page import document
from katds.train.writers.tracker_ids import known_id, remember_id

_PARAMETERS_PER_CALL = 100  # of MLflow


class MlflowWriter(Writer):
    """A run of an experiment on the server of MLFLOW_TRACKING_URI; a resumed run goes on under its id, where the steps after the
    checkpoint are then there twice. A process that is killed leaves it RUNNING, until the run is resumed and comes to an end."""

    @staticmethod
    def check(experiment: str) -> None:
        """Raises ConfigError where MLflow is missing."""
        if find_spec("mlflow") is None:
            raise ConfigError(
                f"watch.mlflow is {experiment}, but mlflow is not installed. Run pip install 'katds[mlflow]'."
            )

    def __init__(self, experiment: str, run: Watched) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self._metric, self._watched, self._ended = Metric, run, False
        try:
            with _impatient():
                self._client = MlflowClient()
                self._id = self._opened(experiment)
                self._client.log_text(self._id, run.recipe, "config.yaml")
        except (MlflowException, OSError) as error:
            uri = os.environ.get("MLFLOW_TRACKING_URI")
            raise ConfigError(
                f"watch.mlflow: {experiment} cannot be opened with MLFLOW_TRACKING_URI {uri} ({type(error).__name__}: "
                f"{first_sentence(error)}). Give the address of a server that runs; a local database needs pip install mlflow."
            ) from None

    def _opened(self, experiment: str) -> str:
        run_id = known_id(self._watched.folder, "mlflow")
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        run_id = str(self._client.create_run(place, run_name=self._watched.name).info.run_id)
        remember_id(self._watched.folder, "mlflow", run_id)
        self._log_parameters(run_id)
        return run_id

    def _log_parameters(self, run_id: str) -> None:
        from mlflow.entities import Param

        parameters = [Param(_legal(key), str(value)) for key, value in flat(self._watched.settings)]
        for at in range(0, len(parameters), _PARAMETERS_PER_CALL):
            self._client.log_batch(run_id, params=parameters[at : at + _PARAMETERS_PER_CALL])

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(_legal(tag), v, now, step) for tag, v in record.items()])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._client.log_text(self._id, document(samples), f"rollouts/step-{step:06d}.html")

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._ended = True
        self._client.log_dict(self._id, dict(summary), "summary.json")

    def close(self, failed: bool = False) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._ended else "FAILED" if failed else "KILLED")


def _legal(name: str) -> str:
    """eval/avg@8 -> eval/avg_at_8: MLflow's names hold letters, digits and _ - . / : and spaces."""
    return re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_"), flags=re.ASCII)


@contextmanager
def _impatient() -> Iterator[None]:
    """At the start a server that does not answer is a mistake in the settings: MLflow would try for minutes. Later its patience is
    welcome."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
