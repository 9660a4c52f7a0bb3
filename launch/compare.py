"""Compares stop rules, objectives and settings: a training run for each cell and seed on the same prompts, then a table.

python launch/compare.py --config launch/recipes/compare_demo.yaml

Every run gets a folder FOLDER/CELL-seedSEED and processes of its own; the file says how many. What is done is not done again: after an
interruption the same command goes on, from the last checkpoint of the run that broke off. A run that fails is reported and left out. At
the end, and with --report at any time, REPORT.md (means with 95% intervals, differences seed by seed, the threshold's drift), results.json
(every number) and two pictures are written. Add cells or seeds to the file and start it again to have only those run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from katds.cli import run_main

if TYPE_CHECKING:
    from katds.compare.cells import Run
    from katds.compare.plan import Comparison

TRAIN = Path(__file__).resolve().with_name("train.py")
EXAMPLE = """\
a comparison file:
  recipe: launch/recipes/demo.yaml      # every cell starts from it
  folder: runs/my-comparison
  seeds: [0, 1, 2]
  cells:
    kat: {}
    opd: {stop: {kind: never}}
    replay: {after: kat, stop: {kind: replay, run: "{after}"}}   # {after}: the folder of kat's run of the same seed
  sweeps:
    kat: {stop.window: [8, 24]}         # cells kat.window-8 and kat.window-24
  objectives:
    jsd: {objective.kind: jsd, cells: [kat, opd]}   # cells kat.jsd and opd.jsd; without `cells` all of them, and jsd alone
"""


def main() -> int:
    options = command_line().parse_args()
    from katds.compare.cells import chosen_runs, plan_runs
    from katds.compare.plan import load_comparison
    from katds.errors import ConfigError

    if find_spec("tabulate") is None:
        raise ConfigError("The table needs tabulate, which is not installed. Run: pip install -e '.[bench,plot]'")
    comparison = load_comparison(options.config)
    runs = plan_runs(comparison)
    chosen = chosen_runs(runs, options.cells)
    if options.dry_run:
        return show_plan(chosen)
    from katds.compare.running import alone, launcher, make_runs

    missing: dict[str, str] = {}
    if not options.report:
        signal.signal(signal.SIGTERM, leave)
        with alone(comparison.folder):
            missing = make_runs(chosen, launcher(TRAIN, comparison.ranks), comparison.ranks, say)
    write_report(comparison, runs, missing)
    return 1 if missing else 0


def command_line() -> argparse.ArgumentParser:
    from katds.compare.plan import Comparison

    about = [f"  {name:<12} {info.description}" for name, info in Comparison.model_fields.items()]
    folded = [textwrap.fill(line, 100, subsequent_indent=" " * 15) for line in about]
    parser = argparse.ArgumentParser(
        prog="launch/compare.py",
        description=__doc__,
        epilog="\n".join([EXAMPLE, "its settings:", *folded]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the comparison file")
    parser.add_argument("--cells", nargs="+", default=[], metavar="CELL", help="run only these (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and which are done; run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing; write the report of what is done")
    return parser


def say(line: str) -> None:
    print(line, flush=True)


def leave(number: int, frame: object) -> NoReturn:
    """An exception ends the run in progress on its way; the signal alone would leave its processes behind."""
    sys.exit(128 + number)


def show_plan(runs: list[Run]) -> int:
    for run in runs:
        say(f"{'done' if run.is_done else 'to do':<6} {run.name}")
    say(f"{sum(run.is_done for run in runs)} of {len(runs)} runs are done")
    return 0


def write_report(comparison: Comparison, runs: list[Run], missing: dict[str, str]) -> None:
    from katds.compare.outcome import gather
    from katds.compare.pictures import draw
    from katds.compare.report import report_text, results, write

    outcomes = gather(runs, missing)
    folder, evaluation = comparison.report_folder, runs[0].recipe.evaluation
    average, passed = evaluation.headline()
    words = {"average": average.split("/")[-1], "passed": passed.split("/")[-1]}
    pictures = draw(outcomes, words["average"], folder)
    text = report_text(comparison, outcomes, words, pictures)
    write(folder, text, results(comparison, outcomes))
    say(f"\n{text}\nwritten to {folder / 'REPORT.md'}; all numbers in {folder / 'results.json'}")


if __name__ == "__main__":
    run_main(main)
