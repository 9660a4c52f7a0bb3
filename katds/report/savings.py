"""What the stop rule saved, and how long rollouts were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from katds.report.chart import GREY, RUNS, Chart, figure, line
from katds.report.run import Run, owner
from katds.report.words import count, share


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    yield _saved(runs)
    yield _tokens(runs)
    yield _lengths(runs)
    yield _evaluated_lengths(runs)


def saved_fraction(run: Run) -> float | None:
    """Over the whole run so far; None where it was not measured."""
    return run.summary["saved_fraction"] if run.summary and "saved_fraction" in run.summary else _last_total(run)


def saved_in_words(run: Run) -> str:
    saved = saved_fraction(run)
    if saved is not None:
        words = f"{run.rule} saved {share(saved)} of the rollout tokens, measured on the audit group"
        return words[0].upper() + words[1:]
    return why_not_saved(run)


def why_not_saved(run: Run) -> str:
    """In a sentence, why there is no measurement."""
    if run.setting("stop.kind") == "never":
        return "Nothing is saved: stop.kind is never"
    if not run.setting("rollout.audit_fraction", 0):
        return "What was saved was not measured: rollout.audit_fraction is 0"
    return "No rollout has been ended yet"


def _last_total(run: Run) -> float | None:
    return run.last("rollout/saved_fraction_total")


def _saved(runs: Sequence[Run]) -> Chart:
    traces: list[Any] = []
    for i, run in enumerate(runs):
        per_step, total = run.curve("rollout/saved_fraction"), run.curve("rollout/saved_fraction_total")
        if not total.steps:
            continue
        colour, whose = RUNS[i % len(RUNS)], f"{run.name}, " if len(runs) > 1 else ""
        if len(runs) == 1:
            marks = {"color": GREY, "size": 5, "opacity": 0.6}
            traces.append(line(per_step, "this step", GREY, mode="markers", marker=marks))
        traces.append(line(total, f"{whose}total so far", colour))
    note = (
        "Rollouts of the audit group are never ended, so that their mean length is what the others' would have been. One step's value is "
        "noisy: the group is small."
    )
    made = figure(traces, "tokens saved", yaxis={"tickformat": ".0%", "zeroline": True}) if traces else None
    return Chart("saved", saved_in_words(runs[0]), note if traces else "", made)


def _tokens(runs: Sequence[Run]) -> Chart:
    curves = [(run, run.cumulative_tokens()) for run in runs]
    traces = [line(curve, run.name, RUNS[i % len(RUNS)], " tokens") for i, (run, curve) in enumerate(curves)]
    whose = [
        f"{run.name} {count(curve.values[-1])}" if len(runs) > 1 else count(curve.values[-1])
        for run, curve in curves
        if curve.values
    ]
    title = f"Rollout tokens written so far: {', '.join(whose)}"
    return Chart("tokens", title, "By the student, audit group included.", figure(traces, "tokens"))


def _lengths(runs: Sequence[Run]) -> Chart:
    run, alone = runs[0], len(runs) == 1
    written = run.curve("rollout/length_mean").values
    title = (
        f"{owner(run, runs)}Mean rollout: {written[0]:.0f} tokens in the first step, {written[-1]:.0f} in the last"
        if written
        else ""
    )
    traces: list[Any] = []
    for i, one in enumerate(runs):
        named = {"written": "rollout/length_mean", "kept, and learnt from": "rollout/kept_mean"}
        named |= {"by the teacher, before": "rollout/prefix_mean"} if alone else {}
        for j, (what, key) in enumerate(named.items()):
            if (curve := one.curve(key)).steps:
                name, colour = (what, RUNS[j]) if alone else (f"{one.name}, {what}", RUNS[i % len(RUNS)])
                dash = {"color": colour, "width": 2, "dash": "dot" if j == 1 and not alone else "solid"}
                traces.append(line(curve, name, colour, " tokens", line=dash))
    return Chart(
        "mean-lengths", title or "No lengths have been written", "", figure(traces, "tokens") if traces else None
    )


def _evaluated_lengths(runs: Sequence[Run]) -> Chart:
    """Responses of the evaluations; of several benchmarks their average."""
    traces = []
    for i, run in enumerate(runs):
        found = [run.scores(key) for key in ("average/length_mean", "length_mean")]
        traces += [line(curve, run.name, RUNS[i % len(RUNS)], " tokens") for curve in found if curve.steps][:1]
    title = "Length of the evaluation's responses"
    if not traces:
        return Chart("evaluated-lengths", title, "The student has not been evaluated.")
    return Chart(
        "evaluated-lengths", title, "Evaluations are never cut by the stop rule.", figure(traces, "tokens, mean")
    )
