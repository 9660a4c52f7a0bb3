"""The run folder's own records: metrics.jsonl, lengths.jsonl and rollouts/step-*.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from katds.core.lengths import FILE as LENGTHS
from katds.core.lengths import StepLengths
from katds.files import replace_text
from katds.train.samples import Sample
from katds.train.step_file import StepFile
from katds.train.writers.base import Watched, Writer


class JsonlWriter(Writer):
    """Attributes:
    evaluations: of a resumed run, those after its first `start` steps: they are not made again.
    """

    def __init__(self, run: Watched) -> None:
        self._rollouts = run.folder / "rollouts"
        self._rollouts.mkdir(parents=True, exist_ok=True)
        for file in self._rollouts.glob("step-*.jsonl"):
            step = file.stem.removeprefix("step-")
            if step.isdigit() and int(step) >= run.start:
                file.unlink()  # it will be made again, or not where run.rollout_samples is 0 by now
        self._metrics = StepFile(run.folder / "metrics.jsonl", run.start)
        self._lengths = StepFile(run.folder / LENGTHS, run.start)
        self.evaluations = self._metrics.evaluations

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        self._metrics.append(step, record)

    def lengths(self, step: int, lengths: StepLengths) -> None:
        self._lengths.append(step, asdict(lengths))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        text = "".join(sample.line() for sample in samples)
        replace_text(self._rollouts / f"step-{step:06d}.jsonl", text)
