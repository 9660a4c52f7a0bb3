"""The page: one HTML file that fetches nothing, with Plotly in it.

Size: Plotly's 4.8 MB, and at most about 2000 points per curve, 72 rollouts of 4000 tokens, and 3 x 32 rows of the Gantt chart: a page
of the demo has 5 MB, one of long rollouts about 15 MB.

Nothing that a model wrote becomes HTML: data lie in a script element of type application/json in which <, > and & are escaped, and
the page's script puts them in as text. A content security policy lets the browser run only the two scripts of the page, by their
hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from katds.errors import ConfigError
from katds.report import accuracy, headline, lengths, losses, phases, savings, stops
from katds.report.chart import Chart
from katds.report.run import Run, read_runs
from katds.report.samples import read_samples

_HERE = Path(__file__).parent


class Section(NamedTuple):
    """Charts under a heading."""

    name: str
    heading: str
    charts: list[Chart]


def write_page(folders: Sequence[Path], steps: Sequence[int], out: Path) -> int:
    """Writes the page of the first of these run folders, with the others laid over its curves; returns its size in bytes.

    `steps`: whose rollouts and phases to show, by finished steps; none: some, evenly chosen.

    Raises ConfigError: a folder that is no run, a step that it does not have, a file that cannot be written, a missing package.
    """
    missing = [name for name in ("plotly", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"The page needs {missing[0]}, which is not installed. Run: pip install -e '.[plot]'")
    runs = read_runs(folders)
    text = render(runs, list(_sections(runs, steps)), read_samples(runs[0], steps))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.write_bytes(text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}. Give another file.") from None


def _sections(runs: Sequence[Run], steps: Sequence[int]) -> Iterator[Section]:
    yield Section("accuracy", "Accuracy", list(accuracy.charts(runs)))
    yield Section("savings", "Savings", list(savings.charts(runs)))
    yield Section("stopping", "Why rollouts ended", list(stops.charts(runs)))
    yield Section("learning", "Learning", list(losses.charts(runs)))
    yield Section("lengths", "Lengths", list(lengths.charts(runs)))
    yield Section("time", "Time", list(phases.charts(runs, steps)))


def render(runs: Sequence[Run], sections: Sequence[Section], samples: Sequence[dict[str, Any]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    # A browser cannot read NaN. What comes from a run holds none (see read_records), and nothing here may make one.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    plotly, script = get_plotlyjs(), (_HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        run=runs[0],
        runs=runs,
        facts=headline.facts(runs[0]),
        progress=headline.progress(runs[0]),
        saved=savings.saved_in_words(runs[0]),
        table=headline.table(runs),
        sections=sections,
        figures={chart.name: _json(chart) for section in sections for chart in section.charts if chart.figure},
        samples=samples,
        made=time.strftime("%Y-%m-%d %H:%M"),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        script=Markup(script),
        hashes=[_hash(plotly), _hash(script)],
    )


def _json(chart: Chart) -> dict[str, Any]:
    figure: dict[str, Any] = chart.figure.to_plotly_json()  # type: ignore[union-attr]
    figure["layout"].pop("template", None)  # the page's own, light or dark
    return figure


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
