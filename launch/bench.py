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

# Each is a module of katds.bench with HELP (one line), SMOKE (arguments of a toy run), options(parser) and run(options) -> Result; where
# there is much to lose, run also saves what it has so far to options.out, if that is there. NEEDS: packages it cannot do without.
# Importing it must be cheap: whatever takes long is imported by run.
SUBS = ("peers", "phases", "savings", "loss", "packing", "threshold", "gpu")
RESULTS = Path(__file__).resolve().parent / "bench_results"


def main() -> None:
    subs = {name: import_module(f"katds.bench.{name}") for name in SUBS}
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
        sub.add_argument(
            "--out",
            type=Path,
            default=argparse.SUPPRESS,
            help=f"folder of the JSON files (default: {RESULTS}; a toy run writes none)",
        )
        module.options(sub)
    choices.add_parser("smoke", help="all of them at toy size")
    return parser


def measure(subs: dict[str, ModuleType], options: argparse.Namespace) -> None:
    from katds.bench.report import claim, save, show
    from katds.errors import ConfigError

    if lacking := missing(subs[options.sub], "tabulate"):
        raise ConfigError(f"bench {options.sub} needs {lacking}. Run: pip install -e '.[bench]'")
    # Toy figures must not take the place of measured ones.
    if "out" not in options and not is_toy(options):
        options.out = RESULTS
    if "out" in options:
        claim(options.out)
    result = subs[options.sub].run(options)
    written = f"written to {save(result, options.out)}" if "out" in options else "a toy run: not written"
    print(show(result), flush=True)
    print(written, flush=True)


def is_toy(options: argparse.Namespace) -> bool:
    given = vars(options)
    return bool(given.get("toy")) or "smoke" in (given.get("shapes") or ())


def missing(module: ModuleType, *more: str) -> str:
    """The packages that are not installed."""
    return ", ".join(name for name in (*more, *getattr(module, "NEEDS", ())) if find_spec(name) is None)


def smoke(subs: dict[str, ModuleType], parser: argparse.ArgumentParser) -> None:
    skipped = []
    with tempfile.TemporaryDirectory() as folder:
        for name, module in subs.items():
            if lacking := missing(module):
                skipped.append(f"smoke: {name} is skipped, {lacking} is not installed. Run: pip install -e '.[bench]'")
                continue
            start = time.perf_counter()
            measure(subs, parser.parse_args([name, "--out", folder, *module.SMOKE]))
            print(f"smoke: {name} took {time.perf_counter() - start:.1f} s\n", file=sys.stderr, flush=True)
    print(*skipped, sep="\n", end="\n" if skipped else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
