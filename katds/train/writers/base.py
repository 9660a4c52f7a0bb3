"""What a writer is told about a run while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katds.core.lengths import StepLengths
from katds.train.samples import Sample

MOST_PAGES = 10  # of sampled text that a run writes; TensorBoard shows no more of a tag


@dataclass(frozen=True, slots=True)
class Watched:
    """The run. `start` is this process's first step; `recipe` the resolved one as YAML, `settings` the same as a mapping."""

    folder: Path
    name: str
    start: int
    steps: int
    recipe: str
    settings: Mapping[str, Any]

    def has_page(self, step: int) -> bool:
        """Whether the texts of this step are shown where they would pile up: of the last step and of up to nine before, evenly spread."""
        every = -(-self.steps // MOST_PAGES)
        return (self.steps - 1 - step) % every == 0


class Writer:
    """Shows a run somewhere. Only rank 0 has any; each overrides what it has a place for."""

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        """The metrics of a step, or (all of them `eval/...`) of an evaluation after so many steps."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Some rollouts of a step, those of the audit group first."""

    def lengths(self, step: int, lengths: StepLengths) -> None:
        """How long all its rollouts were."""

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The run has come to its end: what summary.json holds."""

    def close(self, failed: bool = False) -> None:
        """Nothing follows. Without a summary before, the run was broken off, by an error if it has `failed`, and may be resumed."""
