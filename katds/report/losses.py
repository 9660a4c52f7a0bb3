"""Loss, divergence, entropy and gradient: whether learning is healthy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from katds.report.chart import GREY, RUNS, Chart, figure, line
from katds.report.run import Run, owner

# name, title, unit, and what is drawn: metric -> what it is
_CHARTS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("loss", "Loss", "", {"loss/total": "loss"}),
    (
        "kl",
        "KL to the teacher",
        " nats",
        {"loss/kl": "tokens learnt from", "rollout/kl_mean": "all tokens the rule saw"},
    ),
    ("entropy", "Entropy of the student", " nats", {"loss/entropy": "entropy"}),
    ("gradient", "Norm of the gradient, before clipping", "", {"train/gradient_norm": "norm"}),
)


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for name, title, unit, metrics in _CHARTS:
        traces = []
        for i, run in enumerate(runs):
            for j, (key, what) in enumerate(metrics.items()):
                if (curve := run.curve(key)).steps and not (j and len(runs) > 1):
                    colour = RUNS[i % len(RUNS)] if not j else GREY
                    traces.append(line(curve, run.name if len(runs) > 1 else what, colour, unit))
        values = runs[0].curve(next(iter(metrics))).values
        if traces and values:
            shown = f"{owner(runs[0], runs)}{title}: {values[0]:.3g} in the first step, {values[-1]:.3g} in the last"
            yield Chart(
                name, shown, "", figure(traces, unit.strip() or "mean per token" * (name == "loss"), height=260)
            )
        else:
            yield Chart(name, f"{title}: this run has not written it")
