"""Scores a model with avg@k and pass@k: a Hugging Face folder, a run's checkpoint, or a run's folder (its newest checkpoint).

deepspeed --num_gpus 8 launch/evaluate.py --config launch/recipes/demo.yaml --student.path runs/demo/final

Writes RUN/evaluations/MODEL/results.json and results.md. On SIGTERM or SIGUSR1 it finishes its portion of the problems, keeps their
samples and leaves with exit code 75; after any interruption the same command goes on where it was.
"""

from __future__ import annotations

import sys

from katds.signals import listening


def main() -> None:
    from katds.cli import load_recipe

    recipe = load_recipe(
        sys.argv[1:],
        "launch/evaluate.py",
        "Score the model at student.path (a Hugging Face folder, a checkpoint of a run, or a run) on evaluation.data or "
        "evaluation.benchmarks with avg@k and pass@k. What has been scored is not scored again.",
    )
    # Imported late: a wrong flag is answered at once, not after the seconds that DeepSpeed takes to load.
    from katds.evaluate import evaluate
    from katds.parallel.world import closing_world

    with closing_world():
        evaluate(recipe)


if __name__ == "__main__":
    with listening():  # before PyTorch is loaded: a signal in these seconds would end this rank, and leave the others
        from katds.cli import run_main

        run_main(main)
