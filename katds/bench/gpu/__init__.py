"""One GPU against its own limits: decoding against the memory's bandwidth, scoring and training against the matrix unit.

Both limits are measured in the same run. Models have the shapes of Qwen3 0.6B, 1.7B (students) and 8B (teacher) and random weights
in bf16. A case that fails becomes a row with its error, the others go on, and the exit code is 1. The JSON file is written anew after
each part. --toy runs everything at toy size, also on a CPU, where it says whether the code works and nothing about speed.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from katds.bench.report import Result
from katds.errors import ConfigError

HELP = "decoding, scoring, training and kernels on one GPU, against its measured limits"
SMOKE = ["--toy"]
# Each is a module of this folder with cases(bench) -> (case, function that measures it), ... Its model is made when the first case is
# asked for, and is gone when the part is done.
PARTS = ("decode", "teacher", "train", "loss", "attention", "step")
COLUMNS = ("part", "case", "ms", "tokens/s", "x floor", "MFU", "MFU (sheet)", "GiB", "error")
NOTES = [
    "ms: median of the repetitions of one token step (decode), one forward with its scores (teacher), one forward and backward (train, "
    "loss, attention), one whole training step (step).",
    "x floor: against the time that the weights and the keys and values of the context take at the measured copy bandwidth (target: 1.5).",
    "MFU: FLOPs of the matrix products with weights, 2 per weight and token forward and 4 backward, attention and recomputation not "
    "counted; against the measured bf16 product of {size}^3, and against the data sheet (target in training: 0.45).",
    "GiB: peak of allocated memory above what lay there before the case, which includes model and caches in teacher and train.",
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toy", action="store_true", help="toy sizes; also runs without a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens before decoding begins (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")


def run(options: argparse.Namespace) -> Result:
    import torch

    if not torch.cuda.is_available() and not options.toy:
        raise ConfigError(
            "bench gpu measures a CUDA device, and there is none. Run it on a GPU, or try it out with --toy."
        )
    from katds.bench.gpu.machine import Bench
    from katds.bench.report import save, show

    bench = Bench.here(options.toy, options.context, options.repetitions)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "sub")} | bench.limits()
    result = Result("gpu", "how close does katds come to the limits of a GPU?", [], [], settings, list(NOTES))
    result.notes = [note.replace("{size}", str(bench.product)) for note in result.notes]
    for part in options.parts:
        print(f"gpu: {part}", file=sys.stderr, flush=True)
        for row in _rows(bench, part):
            result.samples.append({k: v for k, v in row.items() if v is not None})
            result.rows.append({column: row.get(column) for column in COLUMNS})
        if "out" in options:
            save(result, options.out)  # should a later part take the process with it
    failed = [row for row in result.rows if row["error"]]
    if failed:
        print(show(result), flush=True)
        where = f"; {save(result, options.out)} has all rows" if "out" in options else ""
        raise RuntimeError(f"{len(failed)} of {len(result.rows)} cases failed, first {failed[0]}{where}")
    return result


def _rows(bench: Any, part: str) -> list[dict[str, Any]]:
    """Every case of a part; an error is a row."""
    rows: list[dict[str, Any]] = []
    try:
        for name, measure in import_module(f"katds.bench.gpu.{part}").cases(bench):
            bench.tidy()
            try:
                rows.append({"part": part, "case": name, **measure()})
            except Exception as error:
                rows.append({"part": part, "case": name, "error": _text(error)})
            print(f"gpu: {rows[-1]}", file=sys.stderr, flush=True)
    except Exception as error:
        rows.append({"part": part, "case": "set-up", "error": _text(error)})
        print(f"gpu: {rows[-1]}", file=sys.stderr, flush=True)
    bench.tidy()
    return rows


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
