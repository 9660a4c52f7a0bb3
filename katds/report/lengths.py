"""How the lengths of rollouts are distributed, from lengths.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from katds.analysis.records import read_records
from katds.core.lengths import FILE
from katds.report.chart import Chart, figure, line
from katds.report.run import Curve, Run, owner
from katds.report.words import share

ROWS, COLUMNS = 40, 200  # of the map: steps are put together where there are more


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Of the first run."""
    run = runs[0]
    limit = int(run.setting("rollout.max_new_tokens", 0) or 0)
    medians, counts = read_histograms(run, limit)
    if not counts:
        yield Chart("lengths", "The lengths of single rollouts are not known", f"This run has no whole line in {FILE}.")
        return
    whose = owner(run, runs)
    ends = [sum(steps) for steps in zip(*counts.values(), strict=True)]
    title = f"{whose}Median length {medians[min(medians)]:.0f} tokens in the first step, {medians[max(medians)]:.0f} in the last"
    note = (
        f"The stronger, the more of a step's rollouts; {share(ends[-1] / sum(ends))} of all are in the topmost row. "
        "Without the audit group."
    )
    yield Chart("lengths", title, note, _map(medians, counts, limit), wide=True)


def read_histograms(run: Run, limit: int) -> tuple[dict[int, float], dict[int, list[int]]]:
    """By finished steps: the median length, and rollouts in each of `ROWS` equal ranges of 1 .. limit tokens."""
    medians: dict[int, float] = {}
    counts: dict[int, list[int]] = {}
    for record in read_records(run.folder / FILE):
        if (lengths := record.get("lengths")) and limit:
            step = int(record["step"]) + 1
            row = counts[step] = [0] * ROWS
            for length in lengths:
                row[min(ROWS - 1, max(0, length - 1) * ROWS // limit)] += 1
            medians[step] = median(lengths)
    return medians, counts


def _map(medians: dict[int, float], counts: dict[int, list[int]], limit: int) -> object:
    import plotly.graph_objects as go

    steps = sorted(counts)
    size = -(-len(steps) // COLUMNS)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    shares = []
    for row in range(ROWS):
        inside = [sum(counts[step][row] for step in group) for group in groups]
        whole = [sum(sum(counts[step]) for step in group) for group in groups]
        shares.append([round(a / b, 5) for a, b in zip(inside, whole, strict=True)])
    middles = [(row + 0.5) * limit / ROWS for row in range(ROWS)]
    ticks = [0.0, 0.01, 0.1, 0.5, 1.0]
    heat = go.Heatmap(
        x=[group[-1] for group in groups], y=middles, z=[[value**0.5 for value in row] for row in shares], customdata=shares,
        zmin=0, zmax=1, colorscale=[[0.0, "rgba(47,126,188,0)"], [1.0, "rgba(47,126,188,1)"]],
        colorbar={
            "title": {"text": "share"}, "tickvals": [t**0.5 for t in ticks], "ticktext": [f"{t:.0%}" for t in ticks], "thickness": 12,
        },
        hovertemplate="step %{x}, about %{y:.0f} tokens: %{customdata:.1%}<extra></extra>", showlegend=False,
    )  # fmt: skip
    curve = Curve([group[-1] for group in groups], [median(medians[step] for step in group) for group in groups])
    return figure(
        [heat, line(curve, "median", "#e07b1a", " tokens")],
        "tokens",
        yaxis={"range": [0, limit]},
        hovermode="closest",
        showlegend=True,
    )
