"""Measures katds: against its peers, against the hardware, and part by part.

python launch/bench.py SUB [options]      one of the sub-benchmarks below; SUB --help lists its options
python launch/bench.py smoke              all of them at toy size, in under a minute: do they run?
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from katds.cli import run_main

# Each module has HELP (one line), SMOKE (arguments of a toy run), options(parser) and run(options) -> Result.
SUBS = {
    "peers": "katds.bench.peers",
    "phases": "katds.bench.phases",
    "loss": "katds.bench.loss",
    "packing": "katds.bench.packing",
    "threshold": "katds.bench.threshold",
    "gpu": "katds.bench.gpu",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(dest="sub", required=True, metavar="SUB")
    for name, module in SUBS.items():
        bench = import_module(module)
        sub = choices.add_parser(
            name, help=bench.HELP, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument(
            "--out",
            type=Path,
            default=Path("launch/bench_results"),
            help="folder of the JSON files (default: %(default)s)",
        )
        bench.options(sub)
    choices.add_parser("smoke", help="all of them at toy size")
    options = parser.parse_args()
    if options.sub == "smoke":
        smoke(parser)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from katds.bench.report import save, show

    result = import_module(SUBS[options.sub]).run(options)
    print(show(result), flush=True)
    print(f"written to {save(result, options.out)}", flush=True)


def smoke(parser: argparse.ArgumentParser) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, module in SUBS.items():
            start = time.perf_counter()
            measure(parser.parse_args([name, "--out", folder, *import_module(module).SMOKE]))
            print(f"smoke: {name} took {time.perf_counter() - start:.1f} s\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
