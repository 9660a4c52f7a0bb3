"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from katds.core import lengths
from katds.core.collective import Collective
from katds.core.stop.base import StopRule
from katds.core.types import Rollout, RolloutBatch, RolloutRequest
from katds.rollout.requests import RequestStream
from katds.rollout.sizes import EngineStats
from katds.train.learner import Learner
from katds.train.monitor import Monitor
from katds.train.statistics import step_metrics, step_sums


class Checkpoints(Protocol):
    def save(self, step: int) -> None: ...


class Engine(Protocol):
    """What writes a step's rollouts: `katds.rollout.engine.RolloutEngine`, or something around it."""

    @property
    def stats(self) -> EngineStats: ...
    def generate(self, requests: Sequence[RolloutRequest], stream: int) -> RolloutBatch: ...


@dataclass(slots=True)
class Trainer:
    """On-policy distillation: write and score rollouts, learn from them, adapt the stop rule, again.

    `evaluate` and `correct` are None without evaluation data or reference answers.
    """

    requests: RequestStream
    engine: Engine
    learner: Learner
    rule: StopRule
    collective: Collective
    monitor: Monitor
    steps: int
    evaluate: Callable[[], Mapping[str, float]] | None
    correct: Callable[[Rollout], bool | None] | None
    evaluate_every: int
    checkpoint_every: int
    before: Mapping[str, float] | None = None  # scores of the untrained and of the trained student
    after: Mapping[str, float] | None = None
    owes_evaluation: bool = False  # of the step that it was left after

    def train(self, start: int, checkpoints: Checkpoints, asked: Callable[[], bool] = lambda: False) -> bool:
        """Collective: steps start .. steps-1; False if `asked` (collective) said after one that it is time to leave: it is saved then."""
        if start == 0:
            self.before = self._evaluate(0)
        elif self.owes_evaluation:
            self.after = self._evaluate(start)
        for done in range(start + 1, self.steps + 1):
            self.step(done - 1)
            due, leaving = self._evaluates_after(done), done < self.steps and asked()
            self.owes_evaluation = due and leaving  # it may take longer than there is time left
            if due and not leaving:
                self.after = self._evaluate(done)
                leaving = done < self.steps and asked()
            if done == self.steps or leaving or _due(done, self.checkpoint_every):
                with self.monitor.phase("checkpoint"):
                    checkpoints.save(done)
            if leaving:
                return False
        return True

    def step(self, step: int) -> None:
        """Collective: one training step. Neither evaluates nor saves."""
        self.monitor.begin(step)
        requests = self.requests.step(step)
        with self.monitor.phase("rollout"):
            batch = self.engine.generate(requests, stream=step)
        with self.monitor.phase("learn"):
            learned = self.learner.update(batch, requests, step)
        with self.monitor.phase("report"):
            self.rule.finish_step(self.collective, requests[0].id, len(requests))
            reasons, decoded = self.rule.reasons, self.engine.stats.decoded_tokens
            sums = step_sums(batch.rollouts, decoded, self.correct, reasons, self.collective)
            record = lengths.collect(batch.rollouts, requests, reasons, self.collective)
        metrics = {**step_metrics(sums, graded=self.correct is not None), **self.rule.metrics()}
        self.monitor.step(step, sums, metrics, learned, batch.rollouts)
        self.monitor.lengths(step, record)

    def _evaluates_after(self, done: int) -> bool:
        return self.evaluate is not None and (done == self.steps or _due(done, self.evaluate_every))

    def _evaluate(self, done: int) -> Mapping[str, float] | None:
        if self.evaluate is None:
            return None
        with self.monitor.phase("evaluation"):
            scores = self.evaluate()
        self.monitor.evaluation(done, scores)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """All of a run's state outside the engines, JSON-compatible. The prompt cursor and the sampling follow from the step."""
        return {
            "rule": self.rule.state_dict(),
            "monitor": self.monitor.state_dict(),
            "before": self.before,
            "after": self.after,
            "owes_evaluation": self.owes_evaluation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self.monitor.load_state_dict(state["monitor"])
        self.before, self.after = state["before"], state["after"]
        self.owes_evaluation = state.get("owes_evaluation", False)  # a checkpoint from before it was known owes none


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
