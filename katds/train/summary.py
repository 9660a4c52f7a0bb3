"""summary.json: one run in a page of numbers, printed at its end as well."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from katds import __version__
from katds.files import replace_text
from katds.train.monitor import STEP_PHASES, Monitor
from katds.train.statistics import false_termination_share, saved_fraction, saved_fraction_paired, terminated_fraction

_PACKAGES = ("torch", "deepspeed", "transformers")


def summarise(
    monitor: Monitor,
    *,
    steps: int,
    ranks: int,
    graded: bool,
    peak_bytes: int,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    device: torch.device,
) -> dict[str, Any]:
    """Everything in summary.json; what a run does not have is null."""
    totals, active = monitor.totals, monitor.active_totals
    loop = sum(monitor.seconds.get(phase, 0.0) for phase in STEP_PHASES)
    return {
        "steps": steps,
        "ranks": ranks,
        "before": before,
        "after": after,
        "rollouts": int(totals["rollouts"]),
        "rollout_tokens": int(totals["tokens"]),
        "decoded_tokens": int(totals["decoded"]),  # with those written beyond a rollout's end within a chunk
        "prefix_tokens": int(totals.get("prefix", 0)),  # that the teacher wrote before the student
        "kept_tokens": int(totals["kept"]),
        "learned_tokens": int(totals["learned"]),
        "length_mean": totals["tokens"] / totals["rollouts"],
        "saved_fraction": saved_fraction(totals),
        "saved_fraction_since_first_termination": saved_fraction(active) if active else None,
        "saved_fraction_paired": saved_fraction_paired(totals),
        "terminated_share": terminated_fraction(totals),
        "terminated_share_since_first_termination": terminated_fraction(active) if active else None,
        "false_termination_share": false_termination_share(totals, graded),
        "audit_rollouts": int(totals["audit"]),
        "audit_cut_graded": int(totals["audit_cut_graded"]),  # false_termination_share is of so many rollouts
        "threshold": monitor.last.get("kat/threshold"),
        "seconds": {key: round(value, 3) for key, value in sorted(monitor.seconds.items())},
        "training_seconds": loop,
        "rollout_tokens_per_second": totals["tokens"] / loop,
        "rollout_tokens_per_second_and_rank": totals["tokens"] / loop / ranks,
        "peak_memory_bytes": peak_bytes,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "versions": {"katds": __version__, **{name: version(name) for name in _PACKAGES}},
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json and prints the numbers that a reader looks for first."""
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{folder}: {summary['steps']} steps on {summary['ranks']} ranks")
    for name, text in _rows(summary):
        print(f"  {name:<34} {text}")
    print(f"  all numbers in {folder / 'summary.json'}; curves: tensorboard --logdir {folder}", flush=True)


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = summary["before"] or {}, summary["after"] or {}
    scores = [key for key in after if "@" in key and not key.endswith(("_low", "_high"))]
    rows = [
        (f"{key} before -> after", f"{before[key]:.3f} -> {after[key]:.3f}" if key in before else f"{after[key]:.3f}")
        for key in scores
    ]
    for key in ("length_mean", "average/length_mean"):
        if key in before and key in after:
            rows.append(("mean length before -> after", f"{before[key]:.0f} -> {after[key]:.0f}"))
    rows.append(("rollout tokens (learnt from)", f"{summary['rollout_tokens']:,} ({summary['learned_tokens']:,})"))
    for key, name in (
        ("saved_fraction", "rollout tokens saved"),
        ("saved_fraction_since_first_termination", "  since the first termination"),
        ("terminated_share", "rollouts terminated"),
        ("false_termination_share", "  of these would have been right"),
    ):
        if summary[key] is not None:
            rows.append((name, f"{summary[key]:.1%}"))
    if summary["threshold"] is not None:
        rows.append(("threshold [nats]", f"{summary['threshold']:.3g}"))
    rows.append(
        (
            "training time",
            f"{summary['training_seconds']:.1f} s, {summary['rollout_tokens_per_second_and_rank']:,.0f} rollout tokens/s and rank",
        )
    )
    rows.append(("peak memory of a rank", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    return rows
