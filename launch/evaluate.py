"""Scores a model (a Hugging Face folder) with avg@k and pass@k.

deepspeed --num_gpus 8 launch/evaluate.py --config launch/recipes/demo.yaml --student.path runs/demo/final
"""

from __future__ import annotations

import sys

from katds.cli import load_recipe, run_main


def main() -> None:
    recipe = load_recipe(
        sys.argv[1:], "launch/evaluate.py", "Score the model at student.path on evaluation.data with avg@k and pass@k."
    )
    # Imported late: a wrong flag is answered at once, not after the seconds that DeepSpeed takes to load.
    from katds.parallel.world import stop_world
    from katds.run import evaluate

    evaluate(recipe)
    stop_world()


if __name__ == "__main__":
    run_main(main)
