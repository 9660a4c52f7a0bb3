"""The page's head: what was run, and the numbers that a reader looks for first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from katds.report.run import PHASES, Run
from katds.report.savings import saved_fraction, why_not_saved
from katds.report.words import count, duration, nats, share

NONE = "\N{EN DASH}"


class Fact(NamedTuple):
    """One number of the head."""

    label: str
    value: str
    note: str = ""


def facts(run: Run) -> list[Fact]:
    """From summary.json where the run has one, else from its metrics so far: the same labels for every run."""
    return [_saved(run), _tokens(run), _score(run), _ended(run), _false_terminations(run), _time(run)]


def progress(run: Run) -> str:
    steps = run.setting("train.steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    if run.summary is not None:
        return f"finished: {run.done:,}{of} steps"
    return f"{run.done:,}{of} steps so far: the run goes on or was broken off (it has no summary.json)"


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of label and a cell per run: with several runs their numbers too."""
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        numbers = [(fact.label, fact.value) for fact in facts(run)] if len(runs) > 1 else []
        for label, value in [*numbers, *_recipe(run)]:
            rows.setdefault(label, [NONE] * len(runs))[i] = value
    return list(rows.items())


def _saved(run: Run) -> Fact:
    saved = saved_fraction(run)
    if saved is None:
        return Fact("tokens saved", NONE, why_not_saved(run))
    since = (run.summary or {}).get("saved_fraction_since_first_termination")
    more = f"; {share(since)} since the first was ended" if since is not None else ""
    return Fact("tokens saved", share(saved), f"measured on the audit group{more}")


def _tokens(run: Run) -> Fact:
    summary = run.summary or {}
    written = run.cumulative_tokens().values
    total = summary.get("rollout_tokens", written[-1] if written else 0.0)
    learned = summary.get("learned_tokens", summary.get("kept_tokens"))
    return Fact("rollout tokens", count(total), f"{count(learned)} of them learnt from" if learned is not None else "")


def _score(run: Run) -> Fact:
    if run.score is None:
        return Fact("accuracy", NONE, "not evaluated")
    scores = run.scores(run.score)
    ends = [scores.values[0], scores.values[-1]] if len(scores.values) > 1 else scores.values
    shown = [f"{value:.3f}" for value in ends]
    low, high = (run.evaluations[scores.steps[-1]].get(f"{run.score}_{end}") for end in ("low", "high"))
    interval = f"95% interval {low:.3f} to {high:.3f}" if low is not None and high is not None else ""
    return Fact(run.score, " \N{RIGHTWARDS ARROW} ".join(shown), interval)


def _ended(run: Run) -> Fact:
    values = run.curve("rollout/terminated_fraction").values
    ended = (run.summary or {}).get("terminated_share", sum(values) / len(values) if values else None)
    threshold = run.last("kat/threshold")
    note = f"share of rollouts; threshold now {nats(threshold)}" if threshold is not None else "share of rollouts"
    return Fact("ended by the rule", NONE if ended is None else share(ended), note)


def _false_terminations(run: Run) -> Fact:
    found = (run.summary or {}).get("false_termination_share")
    note = "share of those the rule would have ended in the audit group that were right in the end"
    if found is None:
        known = run.summary is not None
        note = "not measured" if known else "known at the run's end"
    return Fact("false terminations", NONE if found is None else share(found), note)


def _time(run: Run) -> Fact:
    measured = sum(record.get(f"time/{phase}", 0.0) for record in run.steps.values() for phase in PHASES)
    seconds = (run.summary or {}).get("training_seconds", measured)
    speed = (run.summary or {}).get("rollout_tokens_per_second")
    return Fact(
        "training time", duration(seconds), f"{count(speed)} rollout tokens/s" if speed else "without evaluations"
    )


def _recipe(run: Run) -> list[tuple[str, str]]:
    summary = run.summary or {}
    teachers = [
        str(run.setting("teacher.path") or ""),
        *(f"{k}: {v.get('path')}" for k, v in (run.setting("teachers") or {}).items()),
    ]
    audit = run.setting("rollout.audit_fraction")
    rows = {
        "state": progress(run),
        "student": run.setting("student.path"),
        "teacher": ", ".join(filter(None, teachers)),
        "rule": _section(run.setting("stop")),
        "objective": _section(run.setting("objective")),
        "behaviour": None if run.setting("behaviour.kind") == "student" else _section(run.setting("behaviour")),
        "training data": run.setting("data.train"),
        "rollouts per step": f"{run.rollouts_per_step:,} of up to {run.setting('rollout.max_new_tokens', '?')} tokens"
        + (f", {share(audit)} audit group" if audit else ""),
        "learning rate": run.setting("train.optimizer.lr"),
        "seed": run.setting("run.seed"),
        "ranks": f"{summary['ranks']} ({summary.get('device')})" if "ranks" in summary else None,
        "peak memory of a rank": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
        if "peak_memory_bytes" in summary
        else None,
        "versions": ", ".join(f"{k} {v}" for k, v in summary.get("versions", {}).items()),
    }
    return [(label, str(value)) for label, value in rows.items() if value not in (None, "")]


def _section(section: Any) -> str:
    """`kat: window 12, persistence 4, threshold.eta 0.3`; of several rules, one after another."""
    if not isinstance(section, Mapping):
        return NONE
    rules = section.get("rules")
    if rules:
        return f"{section.get('kind')} of " + "; ".join(_section(rule) for rule in rules)
    settings = ", ".join(_settings(section))
    return f"{section.get('kind')}: {settings}" if settings else str(section.get("kind"))


def _settings(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    words = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            words += _settings(value, f"{prefix}{key}.")
        elif key != "kind" and value is not None:
            words.append(f"{prefix}{key} {value}")
    return words
