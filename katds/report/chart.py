"""A chart of the page, and the strokes that all charts are made of.

Colours of text, grid and background are the page's, which knows whether the reader prefers a dark one; figures hold none.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from katds.report.run import Curve

if TYPE_CHECKING:
    import plotly.graph_objects as go

POINTS = 2000  # of a curve; more cannot be told apart on a screen
RUNS = ("#2f7ebc", "#e07b1a", "#3a9a5b", "#8a63c9", "#cf4a4a", "#1a9a9a", "#c9608f", "#8c8c8c")  # on light and on dark
GREY = "#8c8c8c"
_TICKS = [digit * 10.0**power for power in range(-7, 4) for digit in (1, 2, 5)]
LOGARITHMIC = {
    "type": "log",
    "tickvals": _TICKS,
    "ticktext": [f"{tick:g}" for tick in _TICKS],
}  # Plotly's own show lone digits


@dataclass(frozen=True)
class Chart:
    """A title that says what one sees, a note, and the figure; without one the note says why there is none."""

    name: str
    title: str
    note: str = ""
    figure: go.Figure | None = None
    wide: bool = False


def thinned(curve: Curve, limit: int = POINTS) -> Curve:
    """At most `limit` points: of every stretch the lowest and the highest, so that no spike is lost; and the last one."""
    steps, values = curve
    if len(steps) <= limit:
        return curve
    stretches = (limit - 1) // 2
    chosen = {len(values) - 1}
    for i in range(stretches):
        part = range(i * len(values) // stretches, (i + 1) * len(values) // stretches)
        chosen |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    order = sorted(chosen)
    return Curve([steps[i] for i in order], [values[i] for i in order])


def plain(text: object) -> str:
    """Text for a figure: Plotly takes tags in it for formatting."""
    return html.escape(str(text), quote=False)


def line(curve: Curve, name: str, colour: str, unit: str = "", **more: Any) -> go.Scatter:
    """A curve with a mark on every point where there are few."""
    import plotly.graph_objects as go

    thin = thinned(curve)
    style = {"mode": "lines+markers" if len(thin.steps) < 40 else "lines", "line": {"color": colour, "width": 2}}
    shown = f"%{{y:.4~g}}{unit}<extra>{plain(name)}</extra>"
    return go.Scatter(x=thin.steps, y=thin.values, name=plain(name), **(style | {"hovertemplate": shown} | more))


def figure(traces: Iterable[Any], y: str, x: str = "steps done", **layout: Any) -> go.Figure:
    """A figure whose legend stands above it."""
    import plotly.graph_objects as go

    drawn = list(traces)
    basic = {
        "height": 320,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified",
        "showlegend": len(drawn) > 1,
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
    }
    for key, value in layout.items():
        both = isinstance(value, dict) and isinstance(basic.get(key), dict)
        basic[key] = {**basic[key], **value} if both else value  # type: ignore[dict-item]
    return go.Figure(drawn, basic)


def with_alpha(colour: str, alpha: float) -> str:
    """`#rrggbb` as a translucent colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
