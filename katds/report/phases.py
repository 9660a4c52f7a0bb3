"""Where the time goes: phases of single steps on every rank, and their seconds over the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from katds.analysis.records import Record
from katds.report.chart import RUNS, Chart, figure, line, plain, with_alpha
from katds.report.run import PHASES, Curve, Run, owner, spread, timeline
from katds.report.stops import averaged
from katds.report.words import duration, share

RANKS = 32  # rows per step of the Gantt chart
SMALL = 0.01  # a part of a phase that takes less is not drawn apart
COLOURS = {
    "rollout": ("#2f7ebc", "#1f5a8a", "#63a5d8", "#0f8b8d", "#98c6e6", "#5b7fa6", "#b9d7ec"),
    "learn": ("#e07b1a", "#b35c0c", "#f0a35c", "#8a4a10", "#f7c99b", "#c99a6b", "#fbe0c4"),
    "report": ("#8c8c8c",),
    "evaluation": ("#3a9a5b",),
    "checkpoint": ("#8a63c9",),
}
OTHER = "#c9608f"


def charts(runs: Sequence[Run], steps: Sequence[int]) -> Iterator[Chart]:
    """Of the first run. `steps`: which to show rank by rank; none: the first, the middle and the last."""
    yield _gantt(runs[0], steps)
    yield _seconds(runs[0], owner(runs[0], runs))
    yield _throughput(runs)
    yield _memory(runs)


def _gantt(run: Run, steps: Sequence[int]) -> Chart:
    found = list(timeline(run, spread(steps, 3)))
    if not found:
        missing = (
            "This run has no timeline.jsonl"
            if not (run.folder / "timeline.jsonl").is_file()
            else "timeline.jsonl does not hold these steps"
        )
        return Chart(
            "gantt", "Phases of single ranks are not known", f"{missing}; the seconds below are those of rank 0."
        )
    rows, traces = _bars(found)
    most = max(len(record["ranks"]) for _, record in found)
    note = "Seconds since each rank's own begin of the step; hover over a bar for its length."
    if most > RANKS:
        note += f" {RANKS} of {most} ranks are shown, evenly chosen."
    made = figure(
        traces, "", "seconds since the step began", barmode="overlay", height=110 + 26 * len(rows), hovermode="closest",
        showlegend=True, yaxis={"categoryorder": "array", "categoryarray": rows[::-1], "automargin": True, "type": "category"},
    )  # fmt: skip
    return Chart("gantt", _gantt_title(found), note, made, wide=True)


def _bars(found: Sequence[tuple[int, Record]]) -> tuple[list[str], list[Any]]:
    """The rows from top to bottom, and a trace per phase."""
    import plotly.graph_objects as go

    rows: list[str] = []
    bars: dict[str, list[tuple[str, float, float]]] = {}
    for step, record in found:
        for rank in spread(sorted(record["ranks"], key=int), RANKS):
            rows.append(f"step {step}, rank {rank}")
            for phase, begin, end in record["ranks"][rank]:
                bars.setdefault(phase, []).append((rows[-1], begin, end - begin))
    order = sorted(bars, key=lambda phase: (list(COLOURS).index(phase) if phase in COLOURS else len(COLOURS), phase))
    return rows, [
        go.Bar(
            orientation="h", y=[bar[0] for bar in bars[phase]], base=[round(bar[1], 4) for bar in bars[phase]],
            x=[round(bar[2], 4) for bar in bars[phase]], name=plain(phase), marker={"color": COLOURS.get(phase, (OTHER,))[0]},
            hovertemplate=f"%{{y}}: {plain(phase)} %{{x:.3~f}} s<extra></extra>",
        )
        for phase in order
    ]  # fmt: skip


def _gantt_title(found: Sequence[tuple[int, Record]]) -> str:
    took = [(step, max(end for spans in record["ranks"].values() for _, _, end in spans)) for step, record in found]
    return "How ranks spent " + ", ".join(f"step {step} ({duration(seconds)})" for step, seconds in took)


def _seconds(run: Run, whose: str) -> Chart:
    """Stacked seconds per step; what a phase spent outside its parts is a part as well."""
    import plotly.graph_objects as go

    traces, totals = [], dict.fromkeys(PHASES, 0.0)
    for phase in PHASES:
        whole = averaged(run, f"time/{phase}")
        rest, colours = list(whole.values), COLOURS[phase]
        totals[phase] = _total(run, phase)
        parts = [part for part in _parts(run, phase) if _total(run, f"{phase}/{part}") > SMALL * _total(run, phase)]
        for i, part in enumerate([*parts, ""]):
            curve = averaged(run, f"time/{phase}/{part}") if part else whole
            values = curve.values if part else [max(0.0, value) for value in rest]
            rest = [left - value for left, value in zip(rest, values, strict=True)] if part else rest
            name = f"{phase}: {part}" if part else f"{phase}: all else" if parts else phase
            colour = colours[i % len(colours)]
            traces.append(
                go.Scatter(
                    x=curve.steps, y=[round(value, 5) for value in values], name=plain(name), stackgroup="seconds", mode="lines",
                    line={"width": 0.5, "color": colour}, fillcolor=with_alpha(colour, 0.75),
                    hovertemplate=f"%{{y:.3~g}} s<extra>{plain(name)}</extra>",
                )
            )  # fmt: skip
    every = sum(totals.values())
    if not every:
        return Chart("seconds", "No times have been written")
    shares = ", ".join(f"{share(seconds / every)} {phase}" for phase, seconds in totals.items())
    return Chart(
        "seconds",
        f"{whose}{duration(every)} of training: {shares}",
        "Seconds of each step on rank 0, without evaluations and checkpoints. On a GPU only whole phases are exact: inner ones show where "
        "the host waited.",
        figure(traces, "seconds per step", showlegend=True, height=420),
        wide=True,
    )


def _total(run: Run, phase: str) -> float:
    return sum(float(record.get(f"time/{phase}", 0.0)) for record in run.steps.values())


def _parts(run: Run, phase: str) -> list[str]:
    """What a phase consists of; the parts of parts are in them."""
    prefix = f"time/{phase}/"
    found = dict.fromkeys(
        key.removeprefix(prefix) for record in run.steps.values() for key in record if key.startswith(prefix)
    )
    return [part for part in found if "/" not in part]


def _throughput(runs: Sequence[Run]) -> Chart:
    curves = [(run, run.curve("throughput/rollout_tokens_per_second")) for run in runs]
    traces = [
        line(curve, run.name, RUNS[i % len(RUNS)], " tokens/s") for i, (run, curve) in enumerate(curves) if curve.steps
    ]
    note = "Of whole steps and all ranks. A rule that ends rollouts makes fewer tokens, not more per second."
    made = figure(traces, "tokens per second", yaxis={"rangemode": "tozero"}) if traces else None
    return Chart("throughput", "Rollout tokens per second", note, made)


def _memory(runs: Sequence[Run]) -> Chart:
    traces = []
    for i, run in enumerate(runs):
        steps, peaks = run.curve("memory/peak_bytes")
        if steps:
            traces.append(line(Curve(steps, [peak / 2**30 for peak in peaks]), run.name, RUNS[i % len(RUNS)], " GiB"))
    title = "Peak memory of a rank so far"
    if not traces:
        return Chart("memory", title, "This run has not written memory/peak_bytes.")
    note = "Of the rank that needed most: of the GPU, or of the whole process where there is none."
    return Chart("memory", title, note, figure(traces, "GiB", yaxis={"rangemode": "tozero"}))
