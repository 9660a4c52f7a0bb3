"""Scores of the student over training, and against what they cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from katds.report.chart import RUNS, Chart, figure, line, plain
from katds.report.run import Curve, Run, owner
from katds.report.words import count


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    scored = [run for run in runs if run.score]
    if not scored:
        yield Chart("accuracy", "The student has not been evaluated", _why_none(runs[0]))
        return
    yield Chart("accuracy", _title(scored), _NOTE, figure(_over_steps(runs), "share right", **_SHARE))
    yield Chart(
        "accuracy-tokens",
        "Accuracy against the rollout tokens it took",
        "Up and to the left is better: more right answers for fewer tokens. Whiskers: 95% interval over problems.",
        figure(_over_tokens(runs), "share right", "rollout tokens so far", **_SHARE, hovermode="closest"),
    )


_NOTE = "Mean with its 95% interval over the problems (which knows nothing of other seeds). Step 0 is the untrained student."
_SHARE: dict[str, Any] = {"yaxis": {"tickformat": ".0%"}}


def _why_none(run: Run) -> str:
    if run.setting("evaluation.data") or run.setting("evaluation.benchmarks"):
        return "The recipe asks for evaluations (evaluation.every, and before and after training); none has been written yet."
    return "The recipe has no evaluation.data: give it problems with answers to see accuracy here."


def _title(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        scores = run.scores(str(run.score))
        whose = owner(run, runs)
        if len(scores.values) > 1:
            parts.append(f"{whose}{run.score} went from {scores.values[0]:.3f} to {scores.values[-1]:.3f}")
        else:
            when = "before training" if scores.steps[0] == 0 else f"after {scores.steps[0]} steps"
            parts.append(f"{whose}{run.score} is {scores.values[0]:.3f} {when}")
    return "; ".join(parts)


def _over_steps(runs: Sequence[Run]) -> Iterator[Any]:
    """avg@n of every run with its band; of a run alone pass@k too, and every benchmark."""
    alone = len(runs) == 1
    for i, run in enumerate(runs):
        for j, key in enumerate(_score_names(run)[: None if alone else 1]):
            name, colour = key if alone else f"{run.name}, {key}", RUNS[(i + j) % len(RUNS)]
            scores = run.scores(key)
            yield line(scores, name, colour, error_y=_whiskers(run, key, scores, colour), mode="lines+markers")


def _score_names(run: Run) -> list[str]:
    """Of a run: what is in the headline first, then all other scores, in the order they were written."""
    names = dict.fromkeys(name for scores in run.evaluations.values() for name in scores if "@" in name)
    found = [name for name in names if not name.endswith(("_low", "_high"))]
    return sorted(found, key=lambda name: name != run.score)


def _whiskers(run: Run, key: str, scores: Curve, colour: str) -> dict[str, Any]:
    """Both arms of the interval at each point of `scores`; none where it is not recorded."""
    values = dict(zip(*scores, strict=True))
    low, high = (dict(zip(*run.scores(f"{key}_{end}"), strict=True)) for end in ("low", "high"))
    up = [high.get(step, values[step]) - values[step] for step in scores.steps]
    down = [values[step] - low.get(step, values[step]) for step in scores.steps]
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1.2, "width": 4}


def _over_tokens(runs: Sequence[Run]) -> Iterator[Any]:
    import plotly.graph_objects as go

    for i, run in enumerate(runs):
        if run.score is None:
            continue
        scores, colour = run.scores(run.score), RUNS[i % len(RUNS)]
        tokens = [tokens_before(run, step) for step in scores.steps]
        where = [
            f"after {step:,} steps, {count(total)} tokens" for step, total in zip(scores.steps, tokens, strict=True)
        ]
        yield go.Scatter(
            x=tokens, y=scores.values, text=where, mode="lines+markers", name=plain(run.name), line={"color": colour},
            error_y=_whiskers(run, run.score, scores, colour),
            hovertemplate=f"{plain(run.name)}<br>%{{text}}<br>{plain(run.score)} %{{y:.3f}}<extra></extra>",
        )  # fmt: skip


def tokens_before(run: Run, step: int) -> float:
    """Rollout tokens of the first `step` steps."""
    tokens = run.cumulative_tokens()
    at = bisect_right(tokens.steps, step)
    return tokens.values[at - 1] if at else 0.0
