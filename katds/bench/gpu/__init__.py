"""One GPU against its own limits: decoding against the memory's bandwidth, scoring and training against the matrix unit.

Both limits are measured in the same run. Models have the shapes of Qwen3 0.6B, 1.7B (students) and 8B (teacher) and random weights
in bf16. A case that fails becomes a row with its error, the others go on, and the exit code is 1. The JSON file is written anew after
each part; parts that are not measured now stay in it as they are. --toy runs everything at toy size, also on a CPU, where it says
whether the code works and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from katds.bench.arguments import positive
from katds.bench.report import Result, commit, told, versions
from katds.errors import ConfigError

HELP = "decoding, scoring, training and attention kernels on one GPU, against its measured limits"
SMOKE = ["--toy"]
# Each is a module of this folder with cases(bench) -> (case, function that measures it), ... Its model is made when the first case is
# asked for, and is gone when the part is done.
PARTS = ("decode", "teacher", "train", "attention", "step")
COLUMNS = ("part", "case", "ms", "tokens/s", "x floor", "speed-up", "MFU", "MFU (sheet)", "GiB", "error")
SAME = ("device_name", "toy", "context")  # settings without which parts do not belong into one file
NOTES = [
    "ms: median of the repetitions of one token step (decode), one forward with its scores (teacher), one forward and backward (train, "
    "attention), one whole training step (step).",
    "x floor: against the time that the weights and the keys and values of the context take at the measured copy bandwidth (target: 1.5).",
    "speed-up: over eager decoding, median of the ratios within a turn.",
    "MFU: FLOPs of the matrix products with weights, 2 per weight and token forward and 4 backward, attention and recomputation not "
    "counted (part attention counts its own); against the measured bf16 product of {size}^3, and against the data sheet (target in "
    "training: 0.45).",
    "GiB: peak of allocated memory, with model and caches.",
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toy", action="store_true", help="toy sizes; also runs without a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--context", type=positive, default=1024, help="tokens before decoding begins (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=positive, default=5, help="default: %(default)s")


def run(options: argparse.Namespace) -> Result:
    import torch

    if not torch.cuda.is_available() and not options.toy:
        raise ConfigError(
            "bench gpu measures a CUDA device, and there is none. Run it on a GPU, or try it out with --toy."
        )
    from katds.bench.gpu.machine import Bench, software
    from katds.bench.report import save, show

    for line in software():
        say(line)
    bench = Bench.here(options.toy, options.context, options.repetitions)
    settings = told(options) | bench.limits()
    result = Result("gpu", "how close does katds come to the limits of a GPU?", [], [], settings, list(NOTES))
    result.notes = [note.replace("{size}", str(bench.product)) for note in result.notes]
    if "out" in options:
        keep(options.out / "gpu.json", result)
    for part in options.parts:
        say(part)
        replace(result, part, _rows(bench, part))
        if "out" in options:
            save(result, options.out)  # should a later part take the process with it
    mine = [row for row in result.rows if row["part"] in options.parts]
    failed = [row for row in mine if row["error"]]
    if failed:
        print(show(result), flush=True)
        where = f"; {save(result, options.out)} has all rows" if "out" in options else ""
        raise RuntimeError(f"{len(failed)} of {len(mine)} cases failed, first {failed[0]}{where}")
    return result


def keep(path: Path, result: Result) -> None:
    """Takes over the parts of an earlier run's file, unless that was another device or other sizes."""
    if not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())
        differing = [key for key in SAME if earlier["settings"][key] != result.settings[key]]
        rows, samples = ([row for row in earlier[kind] if row["part"] in PARTS] for kind in ("rows", "samples"))
        measured = earlier["settings"]["measured"]
    except (json.JSONDecodeError, KeyError, TypeError):
        differing = ["format"]
    if differing:
        say(f"{path} will be replaced: other {', '.join(differing)}")
        return
    result.rows, result.samples = rows, samples
    result.settings["measured"] = measured


def replace(result: Result, part: str, rows: list[dict[str, Any]]) -> None:
    """Puts a part's rows into their place, and notes how they came about."""
    samples = [{k: v for k, v in row.items() if v is not None} for row in rows]
    table = [{column: row.get(column) for column in COLUMNS} for row in rows]
    result.rows = _ordered([row for row in result.rows if row["part"] != part] + table)
    result.samples = _ordered([row for row in result.samples if row["part"] != part] + samples)
    limits = {key: result.settings[key] for key in ("copy_bytes_per_second", "product_flops", "repetitions")}
    made = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(), "torch": versions()["torch"]}
    result.settings["measured"] = {**result.settings.get("measured", {}), part: made | limits}


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: PARTS.index(row["part"]))


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
            del measure  # it holds a model, and the next case may make another one
            say(str(rows[-1]))
    except Exception as error:
        rows.append({"part": part, "case": "set-up", "error": _text(error)})
        say(str(rows[-1]))
    bench.tidy()
    return rows


def _text(error: Exception) -> str:
    """The end of the message: that of another process's error begins with where it came from. All of it goes to standard error."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {str(error).strip()[-500:]}"


def say(line: str) -> None:
    print(f"gpu: {line}", file=sys.stderr, flush=True)
