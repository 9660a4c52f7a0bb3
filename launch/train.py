"""Distils a teacher into a student on the student's own rollouts.

deepspeed --num_gpus 8 launch/train.py --config launch/recipes/demo.yaml --stop.window 64

On SIGTERM or SIGUSR1 it finishes the step, saves and leaves with exit code 75; --run.resume goes on from there. When a rank or a
host is gone the others leave with exit code 69.
"""

from __future__ import annotations

import sys

from katds.signals import listening


def main() -> int:
    from katds.cli import load_recipe

    recipe = load_recipe(
        sys.argv[1:], "launch/train.py", "Distil a teacher into a student on the student's own rollouts."
    )
    # Imported late: a wrong flag is answered at once, not after the seconds that DeepSpeed takes to load.
    from katds.errors import Interrupted
    from katds.parallel.world import closing_world
    from katds.run import train

    with closing_world():
        finished = train(recipe)
    return 0 if finished else Interrupted.exit_code


if __name__ == "__main__":
    with listening():  # before PyTorch is loaded: a signal in these seconds would end this rank, and leave the others
        from katds.cli import run_main

        run_main(main)
