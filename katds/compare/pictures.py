"""The outcome as pictures: accuracy against rollout tokens, and the threshold over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from katds.compare.outcome import Outcome, Outcomes


def draw(outcomes: Outcomes, accuracy: str, folder: Path) -> list[Path]:
    """The pictures that could be drawn; none without matplotlib. `accuracy` names it, e.g. avg@4."""
    if find_spec("matplotlib") is None:
        outcomes.notes.append("Without matplotlib there are no pictures. Run: pip install -e '.[plot]'.")
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        outcome for outcome in outcomes.cells.values() if outcome.cell.swept is None
    ]  # those of sweeps have tables
    made = []
    for name, content, paint in (
        ("accuracy", [cell for cell in cells if cell.interval("average")], _accuracy),
        ("thresholds", [cell for cell in cells if any(cell.thresholds.values())], _thresholds),
    ):
        if content:
            figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
            paint(axis, content, accuracy)
            axis.legend(fontsize=8)
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=120)
            plt.close(figure)
    return made


def _accuracy(axis: Any, cells: Sequence[Outcome], accuracy: str) -> None:
    """A point per cell with both 95% intervals."""
    for i, cell in enumerate(cells):
        score, tokens = cell.interval("average"), cell.interval("tokens")
        if score is None or tokens is None:
            continue
        axis.errorbar(
            tokens.mean / 1e6, score.mean, xerr=(tokens.half or 0.0) / 1e6, yerr=score.half or 0.0, fmt="o^sDv"[i // 10 % 5],
            color=f"C{i % 10}", label=cell.cell.name, capsize=3, lw=1,
        )  # fmt: skip
    axis.set(xlabel="rollout tokens [M]", ylabel=f"{accuracy} after training")


def _thresholds(axis: Any, cells: Sequence[Outcome], accuracy: str) -> None:
    """A line per run, in its cell's colour."""
    for i, cell in enumerate(cells):
        for j, line in enumerate(cell.thresholds.values()):
            steps = [step + 1 for step in line]
            style = ("-", "--", ":")[i // 10 % 3]
            axis.plot(steps, list(line.values()), style, color=f"C{i % 10}", lw=1, label=None if j else cell.cell.name)
    axis.set(yscale="log", xlabel="step", ylabel="threshold [nats]")
