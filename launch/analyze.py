"""Plots the per-token KL along rollouts that a run has saved, with KAT's cut.

python launch/analyze.py runs/demo --out kl.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from katds.analysis.kl_plot import choose, plot, read_rollouts, thresholds_by_step
from katds.cli import read_recipe, run_main
from katds.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/demo")
    parser.add_argument("--out", type=Path, default=Path("kl.svg"), help="picture: .svg, .png or .pdf (default kl.svg)")
    parser.add_argument("--count", type=int, default=2, help="rollouts to draw (default 2)")
    arguments = parser.parse_args()
    rows = choose(read_rollouts(arguments.run), arguments.count)
    if not rows:
        raise ConfigError(
            f"{arguments.run} holds no audit rollout that the stop rule would have cut. Take a run of stop.kind kat with "
            "rollout.audit_fraction above 0."
        )
    stop = read_recipe(arguments.run / "config.yaml")["stop"]
    windows = [rule["window"] for rule in stop.get("rules", [stop]) if "window" in rule]
    plot(rows, next(iter(windows), 1), thresholds_by_step(arguments.run), arguments.out)
    print(f"{len(rows)} rollouts of {arguments.run} drawn in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
