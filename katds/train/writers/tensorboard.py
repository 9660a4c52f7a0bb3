"""TensorBoard: scalars, a layout of them (tab Custom Scalars), and some text (tab Text)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from katds.train.samples import Sample
from katds.train.writers.base import Watched, Writer
from katds.train.writers.page import page

# Category -> chart -> regular expressions of its tags. Tags of stop rules and objectives are open, so that most are patterns.
LAYOUT = {
    "savings": {
        "share of rollout tokens saved": [r"rollout/saved_fraction$", r"rollout/saved_fraction_total$"],
        "tokens per rollout": [r"rollout/length_mean$", r"rollout/kept_mean$", r"rollout/prefix_mean$"],
        "share of rollouts ended by the rule": [r"rollout/terminated_fraction$"],
        "share of these that would have been right": [r"kat/false_terminations$"],
    },
    "stop rule": {
        "threshold and window minima [nats]": [r"kat/threshold", r"kat/min_window"],
        "why rollouts ended [share]": [r"stop/"],
        "all else that rule and objective say": [
            r"(?!rollout/|stop/|eval/|loss/|train/|time/|throughput/|memory/|kat/[tmf]).*"
        ],
    },
    "accuracy": {
        "avg@ and pass@": [r"eval/.*@[^/_]*$"],
        "95% interval": [r"eval/.*_(low|high)$"],
        "length and share that ended by itself": [r"eval/(.*/)?(length_mean|finished)$"],
    },
    "learning": {
        "loss": [r"loss/total$"],
        "KL [nats per token]": [r"loss/kl$", r"rollout/kl_mean$"],
        "other parts of the loss": [r"loss/(?!total$|kl$)"],
        "gradient norm": [r"train/gradient_norm$"],
        "learning rate": [r"train/lr$"],
        "batch": [r"train/(?!gradient_norm$|lr$)"],
    },
    "time": {
        "phases of a step [s]": [r"time/[^/]+$"],
        "parts of the rollout phase [s]": [r"time/rollout/"],
        "parts of learning [s]": [r"time/learn/"],
        "other parts [s]": [r"time/(?!rollout/|learn/)[^/]+/"],
    },
    "speed and memory": {
        "rollout tokens per second": [r"throughput/"],
        "peak memory of a rank [bytes]": [r"memory/"],
    },
}


class TensorboardWriter(Writer):
    """Args:
    evaluations: to be shown again: TensorBoard drops them with all from step `run.start` on.

    Its text of a run has at most 10 pages: with the 4 rollouts per step of the default, each of at most some 40 kB of English text.
    """

    def __init__(self, run: Watched, evaluations: Sequence[Mapping[str, float]]) -> None:
        again = run.start > 0 or any(run.folder.glob("events.out.tfevents*"))
        self._run = run
        self._events = SummaryWriter(str(run.folder), purge_step=run.start if again else None)
        multiline = {
            category: {c: ["Multiline", tags] for c, tags in charts.items()} for category, charts in LAYOUT.items()
        }
        self._events.add_custom_scalars(multiline)
        self._events.add_text("recipe", "".join(f"    {line}\n" for line in run.recipe.splitlines()), run.start)
        for record in evaluations:
            self.scalars(run.start, record)

    def scalars(self, step: int, record: Mapping[str, float]) -> None:
        for tag, value in record.items():
            self._events.add_scalar(tag, value, step)
        self._events.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        if samples and self._run.has_page(step):
            self._events.add_text("rollouts", page(samples), step)

    def close(self, failed: bool = False) -> None:
        self._events.close()
