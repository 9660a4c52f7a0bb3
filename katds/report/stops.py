"""The stop rule at work: its threshold, why rollouts ended, and which were ended wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from katds.report.chart import LOGARITHMIC, POINTS, RUNS, Chart, figure, line, plain, with_alpha
from katds.report.run import Curve, Run, owner
from katds.report.words import nats, share

NATURAL = {"stop/eos": ("ended by the student", "#3a9a5b"), "stop/length": ("at the maximum length", "#8c8c8c")}
RULES = ("#2f7ebc", "#e07b1a", "#8a63c9", "#cf4a4a")


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    yield _reasons(runs[0], owner(runs[0], runs))
    yield _threshold(runs)
    yield _false_terminations(runs)


def _threshold(runs: Sequence[Run]) -> Chart:
    traces: list[Any] = []
    for i, run in enumerate(runs):
        named = {"threshold": "kat/threshold", "smallest windows, mean of the last": "kat/min_window"}
        for j, (what, key) in enumerate(named.items()):
            if (curve := run.curve(key)).steps:
                several = len(runs) > 1
                colour = RUNS[(i if several else j) % len(RUNS)]
                style = {"color": colour, "width": 2, "dash": "dot" if several and j else "solid"}
                traces.append(line(curve, f"{run.name}, {what}" if several else what, colour, " nats", line=style))
    values = runs[0].curve("kat/threshold").values
    if values:
        title = f"{owner(runs[0], runs)}The threshold went from {values[0]:.3g} to {nats(values[-1])}"
    elif not any(rule.get("kind") == "kat" for rule in runs[0].rules):
        title = f"stop.kind {runs[0].setting('stop.kind')} has no threshold"
    else:
        title = "There is no threshold yet"
    note = "The rule ends a rollout whose windows of KL stay below the threshold: a quantile of the smallest windows of recent rollouts."
    made = figure(traces, "nats", yaxis=LOGARITHMIC) if traces else None
    return Chart("threshold", title, note if traces else "", made)


def _reasons(run: Run, whose: str) -> Chart:
    """Stacked shares. Rollouts per step are a fixed number, so that the mean of shares is the share of all."""
    import plotly.graph_objects as go

    keys = sorted({key for record in run.steps.values() for key in record if key.startswith("stop/")}, key=_place)
    kept = {key: averaged(run, key) for key in keys}
    if not keys:
        return Chart("stops", "No reason of a rollout's end has been written")
    traces, parts = [], []
    rules = iter(RULES * len(keys))
    for key, curve in kept.items():
        name, colour = NATURAL.get(key) or (f"ended by {key.removeprefix('stop/')}", next(rules))
        if not any(curve.values):
            continue
        parts.append(f"{share(sum(curve.values) / len(curve.values))} {name}")
        traces.append(
            go.Scatter(
                x=curve.steps, y=curve.values, name=plain(name), stackgroup="share", mode="lines",
                line={"color": colour, "width": 1}, fillcolor=with_alpha(colour, 0.55),
                hovertemplate=f"%{{y:.1%}}<extra>{plain(name)}</extra>",
            )
        )  # fmt: skip
    made = figure(traces, "share of rollouts", yaxis={"tickformat": ".0%", "range": [0, 1]}, showlegend=True)
    return Chart(
        "stops", f"{whose}{', '.join(parts)}", "Shares of all rollouts, audit group included.", made, wide=True
    )


def _place(key: str) -> tuple[int, str]:
    return (list(NATURAL).index(key) if key in NATURAL else len(NATURAL), key)


def averaged(run: Run, key: str) -> Curve:
    """A metric at every step, 0 where a step lacks it; means over stretches where there are more than `POINTS` steps."""
    steps, values = list(run.steps), [float(record.get(key, 0.0)) for record in run.steps.values()]
    size = -(-len(steps) // POINTS)
    parts = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    return Curve([steps[part[-1]] for part in parts], [sum(values[i] for i in part) / len(part) for part in parts])


def _false_terminations(runs: Sequence[Run]) -> Chart:
    curves = [(run, run.curve("kat/false_terminations")) for run in runs]
    traces = [
        line(
            curve, run.name, RUNS[i % len(RUNS)], mode="lines+markers", line={"color": RUNS[i % len(RUNS)], "width": 1}
        )
        for i, (run, curve) in enumerate(curves)
        if curve.steps
    ]
    share_of = (runs[0].summary or {}).get("false_termination_share")
    if share_of is not None:
        title = f"{owner(runs[0], runs)}{share(share_of)} of those that {runs[0].rule} would have ended went on to a right answer"
    else:
        title = (
            "Rollouts that would have been ended, and went on to a right answer"
            if traces
            else "False terminations are not known"
        )
    note = (
        "Measured on the audit group, which is never ended and graded where the data has answers: a few rollouts per step, so that single "
        "steps say little."
    )
    missing = "Needs a rule that ends rollouts, an audit group, and training prompts with answers (data.answer_column)."
    made = figure(traces, "share right", yaxis={"tickformat": ".0%", "rangemode": "tozero"}) if traces else None
    return Chart("false-terminations", title, note if traces else missing, made)
