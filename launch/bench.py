"""Measures katds: against its peers, against the hardware, and part by part.

python launch/bench.py SUB [options]      one of the sub-benchmarks below; SUB --help lists its options
python launch/bench.py smoke              all of them at toy size, in about a minute: do they run?
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# Each is a module of katds.bench with HELP (one line), SMOKE (arguments of a toy run), options(parser) and run(options) -> Result.
# Importing it must be cheap: whatever takes long is imported by run.
SUBS = ("peers", "phases", "savings", "loss", "packing", "threshold", "gpu")


def main() -> None:
    subs = {name: import_module(f"katds.bench.{name}") for name in SUBS if find_spec(f"katds.bench.{name}")}
    parser = command_line(subs)
    options = parser.parse_args()
    # Imported late: help and wrong options are answered at once.
    from katds.cli import run_main

    run_main(lambda: smoke(subs, parser) if options.sub == "smoke" else measure(subs, options))


def command_line(subs: dict[str, ModuleType]) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="launch/bench.py", description=__doc__, formatter_class=layout)
    choices = parser.add_subparsers(dest="sub", required=True, metavar="SUB")
    for name, module in subs.items():
        sub = choices.add_parser(name, help=module.HELP, description=module.__doc__, formatter_class=layout)
        results = Path("launch/bench_results")
        sub.add_argument("--out", type=Path, default=results, help="folder of the JSON files (default: %(default)s)")
        module.options(sub)
    choices.add_parser("smoke", help="all of them at toy size")
    return parser


def measure(subs: dict[str, ModuleType], options: argparse.Namespace) -> None:
    from katds.bench.report import save, show

    result = subs[options.sub].run(options)
    print(show(result), flush=True)
    print(f"written to {save(result, options.out)}", flush=True)


def smoke(subs: dict[str, ModuleType], parser: argparse.ArgumentParser) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, module in subs.items():
            start = time.perf_counter()
            measure(subs, parser.parse_args([name, "--out", folder, *module.SMOKE]))
            print(f"smoke: {name} took {time.perf_counter() - start:.1f} s\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
