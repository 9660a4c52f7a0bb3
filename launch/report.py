"""Writes one HTML page about a run: accuracy, savings, why rollouts ended, losses, lengths, time, and sample rollouts with their KL.

  python launch/report.py runs/demo                           # runs/demo/report.html
  python launch/report.py runs/kat --against runs/opd         # the curves of both; accuracy against rollout tokens
  python launch/report.py runs/demo --steps 1 20 45           # rollouts of these steps (as the console counts: from 1), phases of three

Open the file in any browser, send it, or print it: it holds all that it shows and fetches nothing (about 5 MB). It works on a run
that is still going or was broken off, and leaves out, with the reason, what the run did not write.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from katds.cli import run_main
from katds.report.page import write_page


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, e.g. runs/demo")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default RUN/report.html)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[],
        metavar="STEP",
        help="show rollouts of these, and phases of up to three of them (default: evenly chosen)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="other runs, whose curves are laid over this one's",
    )
    options = parser.parse_args()
    out = options.out or options.run / "report.html"
    size = write_page([options.run, *options.against], options.steps, out)
    print(f"{out}: {size / 1e6:.1f} MB. Open it in a browser.")


if __name__ == "__main__":
    run_main(main)
