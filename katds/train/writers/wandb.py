"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from katds.errors import ConfigError, first_sentence
from katds.train.samples import Sample
from katds.train.writers.base import Watched, Writer
from katds.train.writers.page import document
from katds.train.writers.tracker_ids import known_id, remember_id

_WITHOUT_KEY = ("offline", "disabled", "dryrun")


class WandbWriter(Writer):
    """A run of a project; a resumed run goes on under its id. WANDB_MODE, WANDB_ENTITY and the others of its variables are honoured.

    Scalars are drawn over `step`, not over W&B's own counter, which cannot go back to the checkpoint that a run is resumed from: the
    steps after it are there twice, on top of each other.
    """

    @staticmethod
    def check(project: str) -> None:
        """Raises ConfigError where W&B would fail, or ask for a key that nobody can type."""
        if find_spec("wandb") is None:
            raise ConfigError(f"watch.wandb is {project}, but wandb is not installed. Run pip install 'katds[wandb]'.")
        if os.environ.get("WANDB_MODE") in _WITHOUT_KEY:
            return
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                f"watch.wandb is {project}, but there is no API key. Run wandb login, or set WANDB_MODE=offline and send the run with "
                "wandb sync later."
            )

    def __init__(self, project: str, run: Watched) -> None:
        import wandb

        self._html = wandb.Html
        try:
            self._run = wandb.init(
                project=project, name=run.name, id=known_id(run.folder, "wandb"), resume="allow", dir=str(run.folder),
                config=dict(run.settings), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise ConfigError(
                f"watch.wandb: {project} cannot be opened ({type(error).__name__}: {first_sentence(error)}). Look at key and network, or "
                "set WANDB_MODE=offline."
            ) from None
        remember_id(run.folder, "wandb", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"step": step, **record})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log({"step": step, "rollouts": self._html(document(samples), inject=False)})

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({"final": dict(summary)})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
