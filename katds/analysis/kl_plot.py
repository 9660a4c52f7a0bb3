"""Per-token divergence along saved rollouts, with the cut: the picture of what KAT sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from katds.analysis.records import read_records
from katds.errors import ConfigError

Row = dict[str, Any]


def read_rollouts(folder: Path) -> list[Row]:
    """All rollouts that a run has saved, oldest first, each with its training step.

    Raises:
        ConfigError: the folder holds none.
    """
    rows = []
    for file in sorted((folder / "rollouts").glob("step-*.jsonl")):
        step = int(file.stem.removeprefix("step-"))
        rows += [{"step": step, **record} for record in read_records(file)]
    if not rows:
        raise ConfigError(
            f"{folder} holds no rollouts/step-*.jsonl. Give a run folder that was trained with run.rollout_samples above 0."
        )
    return rows


def choose(rows: Sequence[Row], count: int) -> list[Row]:
    """Rollouts that show the rule at work: audit rollouts with a cut, those with most text behind it first; then those with a hole."""
    cut = [row for row in rows if (row["audit"] and row["cut_at"] is not None) or row.get("hole")]
    return sorted(cut, key=lambda row: (row["kept"] - row["tokens"], row["id"]))[:count]


def window_means(values: Sequence[float], window: int) -> list[float]:
    """z_t for t = window .. len(values) (KAT, arXiv 2606.09471)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[t] - sums[t - window]) / window for t in range(window, len(sums))]


def plot(rows: Sequence[Row], window: int, thresholds: dict[int, float], out: Path) -> None:
    """One panel per rollout: d_t, its window mean, the threshold of its step, what is kept and what the rule drops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 2.3 * len(rows)), squeeze=False, layout="constrained")
    for axis, row in zip(axes[:, 0], rows, strict=True):
        tokens = range(1, row["tokens"] + 1)
        axis.bar(tokens, row["kl"], width=1.0, color="#9ecae1", label="KL(student || teacher) of the token")
        axis.plot(
            range(window, row["tokens"] + 1),
            window_means(row["kl"], window),
            color="#08519c",
            label=f"mean of {window} tokens",
        )
        if row["step"] - 1 in thresholds:
            axis.axhline(thresholds[row["step"] - 1], color="#d94801", lw=1, ls="--", label="threshold of the step")
        for span, colour, label in (
            ((row["kept"], row["tokens"]), "#fdd0a2", "dropped: the trap and what follows"),
            (row.get("hole"), "#c7e9c0", "kept, but not learnt from"),
        ):
            if span and span[0] < span[1]:
                axis.axvspan(span[0] + 0.5, span[1] + 0.5, color=colour, alpha=0.5, zorder=0, lw=0, label=label)
        if row["cut_at"] is not None:
            axis.axvline(row["cut_at"], color="#d94801", lw=1.5, label="KAT ends the rollout here")
        axis.set(yscale="log", ylim=(1e-5, 20), xlim=(0, row["tokens"] + 1), ylabel="nats")
        axis.set_title(f"step {row['step'] + 1}, {row['prompt']}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("response token")
    axes[0, 0].legend(fontsize=7, ncols=3, loc="upper right")
    figure.savefig(out)
    plt.close(figure)


def thresholds_by_step(folder: Path) -> dict[int, float]:
    """`kat/threshold` as each step's end set it; step k is judged by that of step k - 1."""
    records = read_records(folder / "metrics.jsonl")
    return {record["step"]: record["kat/threshold"] for record in records if record.get("kat/threshold") is not None}
