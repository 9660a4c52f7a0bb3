"""The run itself: what it saves, where it is, who watches it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from katds.settings import Count, Positive, Scale, Section

# A beat is an eighth of it or less: what keeps a process from running for a second (a full machine, a long call) must be no alarm.
SHORTEST_LOST_AFTER_SECONDS = 5.0


class CheckpointConfig(Section):
    """What is saved, and how often."""

    every: Count = Field(50, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    export: bool = Field(True, description="write the final student as a Hugging Face folder")


class RunConfig(Section):
    """Name, place and seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="folder of the run below run.folder: letters, digits and . _ -"
    )
    folder: Path = Field(Path("runs"), description="where runs are written")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of the prompt order and of sampling")
    resume: bool | Literal["auto"] = Field(
        False,
        description="go on from the newest checkpoint of this run; auto, for schedulers: where there is none yet, begin",
    )
    rollout_samples: Count = Field(4, description="rollouts per step written to rollouts/, with their per-token KL")
    lost_after_seconds: Scale = Field(
        120.0,
        description="silence after which a rank or a host counts as lost, which ends the run on all others with exit code 69; at least 5; "
        "0: they wait for it, up to half an hour",
    )

    def check(self) -> None:
        """Raises ValueError for a time that ranks which live may well be silent for."""
        if 0 < self.lost_after_seconds < SHORTEST_LOST_AFTER_SECONDS:
            raise ValueError(
                f"run.lost_after_seconds is {self.lost_after_seconds:g}, a silence that busy ranks would be taken for lost by; give at "
                f"least {SHORTEST_LOST_AFTER_SECONDS:g}, or 0 to wait for ranks that are lost"
            )


class WatchConfig(Section):
    """Where else a run is shown while it trains, besides its folder and TensorBoard. A tracker that fails then is a warning."""

    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Weights & Biases project (pip install 'katds[wandb]'); WANDB_MODE=offline keeps the run for wandb sync",
    )
    mlflow: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="MLflow experiment, on the server of MLFLOW_TRACKING_URI (pip install 'katds[mlflow]')"
    )
    prometheus: Path | None = Field(
        None,
        description="folder that node_exporter's textfile collector reads; katds-NAME.prom there has the newest step (pip install "
        "'katds[prometheus]')",
    )
