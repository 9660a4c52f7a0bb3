"""Predicts what a run needs before it is started: memory per GPU, what will not fit, settings that would, and the time of a step.

python launch/plan.py --config my.yaml --gpus 64 --gpu h200
python launch/plan.py --config my.yaml --gpus 64 --gpu h200 --lengths runs/first --natural runs/first-never
python launch/plan.py --config my.yaml --gpus 8 --gpu h200 --sweep rollout.slots=16,32 --sweep teacher.gather=layer,phase
deepspeed --num_gpus 2 launch/plan.py --measure machine.json && python launch/plan.py --config my.yaml --gpus 2 --profile machine.json

Reads the models' config.json, the prompts and DeepSpeed's files, and loads no weights. Any setting of the recipe is also a flag, as for
launch/train.py (--rollout.slots 64). Everything is predicted, and nothing is measured but what --measure has written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from katds.cli import load_recipe, run_main

if TYPE_CHECKING:
    from katds.config import Recipe
    from katds.plan.hardware import Profile


def main() -> None:
    options, rest = command_line().parse_known_args()
    if options.measure is not None:
        measure_here(options.measure)
        return
    recipe = read_recipe(rest)
    # Imported late: a wrong flag is answered at once.
    from katds.plan.hardware import GIB, find
    from katds.plan.planning import Wishes, make_plan
    from katds.plan.report import as_json, text

    host = None if options.host_gib is None else options.host_gib * GIB
    profile = find(options.gpu, options.profile, options.gpus_per_node, host)
    if options.sweep:
        sweep_settings(options, rest, profile)
        return
    wishes = Wishes(options.gpus, options.lengths, options.natural, options.stretch, options.scaling == "weak")
    plan = make_plan(recipe, profile, wishes)
    print(json.dumps(as_json(plan), indent=1) if options.json else text(plan), flush=True)


def read_recipe(words: list[str]) -> Recipe:
    return load_recipe(words, "launch/plan.py", "Predict memory and time of a run.")


def sweep_settings(options: argparse.Namespace, rest: list[str], profile: Profile) -> None:
    """A row for each combination."""
    from katds.errors import ConfigError
    from katds.plan.sweep import as_json, parse, sweep, text

    if options.lengths or options.natural or options.stretch:
        raise ConfigError(
            "--sweep takes every rollout as long as it may be; remove --lengths, --natural and --stretch, or --sweep."
        )
    settings = [parse(each) for each in options.sweep]
    names = [name for name, _ in settings]
    rows = sweep(settings, lambda flags: read_recipe([*rest, *flags]), profile, options.gpus)
    print(
        json.dumps(as_json(names, rows), indent=1) if options.json else text(names, rows, profile, options.gpus),
        flush=True,
    )


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="--config FILE and --SECTION.SETTING VALUE: the recipe; launch/train.py --help lists its settings",
    )  # fmt: skip
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="ranks of the run (default: %(default)s)")
    parser.add_argument("--gpu", metavar="NAME", help="h100, h200, a100-80, a100-40, b200, l40s or rtx4090")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of the device, in place of --gpu")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help="default: 8, or the profile's")
    parser.add_argument(
        "--host-gib", type=positive, metavar="N", help="memory of a node's host (default: the profile's, or unknown)"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="SETTING=V,V",
        help="a row for each value of a setting of the recipe, instead of a plan: memory, step, and how long a rollout may be; given "
        "several times, for all combinations",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=Path, metavar="RUN", help="folder of a run, whose rollouts' lengths are taken"
    )
    parser.add_argument(
        "--natural", type=Path, metavar="RUN",
        help="folder of a run with stop.kind never, to compare with; the audit group is as long, too (default: the audit rollouts that "
        "--lengths has saved)",
    )  # fmt: skip
    parser.add_argument(
        "--stretch", type=above_zero, metavar="FACTOR",
        help="recorded rollouts are taken to be so many times as long, at most rollout.max_new_tokens: a record of a small task stands for "
        "a longer one",
    )  # fmt: skip
    parser.add_argument(
        "--scaling", choices=("weak", "strong"), default="weak",
        help="simulated steps on 1 to 1024 GPUs: rollouts per GPU stay the same, or the recipe's step is shared (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print every number as JSON instead")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure this machine and write its profile")
    return parser


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def measure_here(file: Path) -> None:
    """On every rank of the launcher, or on this process alone."""
    from katds.parallel.world import stop_world
    from katds.plan.hardware import write_profile
    from katds.plan.measure import measure

    profile = measure()
    if int(os.environ.get("RANK", "0")) == 0:
        write_profile(profile, file)
        print(f"{profile}\nwritten to {file}", file=sys.stderr, flush=True)
    stop_world()


if __name__ == "__main__":
    run_main(main)
