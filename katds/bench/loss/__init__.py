"""The loss on top of the output head: time and peak memory of one forward and backward pass, katds against others.

Reverse KL of the student against the teacher, averaged over T tokens; gradients of the hidden states and of the head's
weight. `top-k`: over the student's top 64 and a tail bucket, the teacher's scores given. `full`: over the vocabulary,
the teacher's logits made from its hidden states by its own head. Within a support all contenders compute the same, and
that is checked: losses and gradients have to agree with katds before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from katds.bench.arguments import positive
from katds.bench.loss.contenders import TOLERANCE, Case
from katds.bench.report import Result, save, told
from katds.bench.timing import alternate, ratio, spread
from katds.errors import ConfigError

HELP = "time and memory of the loss and its gradients, against plain autograd and liger-kernel"
SMOKE = ["--cases", "512,32,64,float32,tied", "--repetitions", "1"]
CASES = (
    "2048,128,2048,float32,tied",
    "16384,384,2048,float32,tied",
    "32768,1024,512,float32,tied",
    "32768,1024,512,float32,untied",
    "32768,1024,1024,float32,untied",
    "151936,1024,512,bfloat16,tied",
    "151936,1024,512,bfloat16,untied",
    "151936,1024,1024,bfloat16,untied",
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", type=Case.parse, nargs="+", default=[Case.parse(text) for text in CASES], metavar="V,H,T,TYPE,HEAD",
        help=f"vocabulary, hidden size, tokens, float32 or bfloat16, tied or untied (default: {' '.join(CASES)})",
    )  # fmt: skip
    parser.add_argument("--supports", nargs="+", choices=("top-k", "full"), default=["top-k", "full"])
    parser.add_argument("--repetitions", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--liger-chunk", type=positive, default=256, help="rows of liger-kernel's chunks; its own default is 1024 (default: %(default)s)"
    )  # fmt: skip


def run(options: argparse.Namespace) -> Result:
    import torch

    from katds.bench.loss.contenders import contenders, disagreement, make_inputs
    from katds.bench.loss.memory import peak_bytes

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but there is no CUDA device. Use --device cpu, or run it on a GPU.")
    torch.set_num_threads(options.threads)
    result = Result("loss", "what do the loss and its gradients cost, in time and in memory?", [], notes=_notes())
    result.settings = told(options) | {"cases": [vars(case) for case in options.cases]}
    for case in options.cases:
        inputs = make_inputs(case, torch.device(options.device))
        for support in options.supports:
            runs = contenders(inputs, support, options.liger_chunk)
            name = {**vars(case), "support": support}
            print(f"loss: {name}", file=sys.stderr, flush=True)
            # Memory first, while this process has freed nothing that a child could use again.
            peaks = {contender: peak_bytes(run, inputs) for contender, run in runs.items()}
            apart = disagreement(runs, inputs, case.dtype)
            # The comparison has warmed everything up.
            seconds = alternate(runs, options.repetitions, warmup=0, settle=_settle(options.device))
            result.samples.append({**name, "seconds": seconds, "bytes": peaks})
            result.rows.append({**name, **_row(seconds, peaks, apart)})
        if "out" in options:
            save(result, options.out)  # should a later case take the process with it
    return result


def _row(seconds: dict[str, list[float]], peaks: dict[str, int], apart: float) -> dict[str, Any]:
    others = [name for name in seconds if name != "katds"]
    fastest = min(others, key=lambda name: spread(seconds[name]).median)
    # liger-kernel has no top-k loss; where it is not installed, it has no column at all.
    missing = ["liger"] if find_spec("liger_kernel") and "liger" not in seconds else []
    times = {f"{name} ms": round(spread(values).median * 1e3, 1) for name, values in seconds.items()}
    memory = {f"{name} MiB": round(peaks[name] / 2**20) for name in seconds}
    return {
        **times, **{f"{name} ms": "" for name in missing},
        "katds / fastest": str(ratio(seconds["katds"], seconds[fastest])), "fastest": fastest,
        **memory, **{f"{name} MiB": "" for name in missing},
        "difference": float(f"{apart:.1e}"),
    }  # fmt: skip


def _settle(device: str) -> Callable[[], Any]:
    import torch

    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def _notes() -> list[str]:
    missing = [] if find_spec("liger_kernel") else ["liger-kernel is not installed (.[bench]); its column is left out"]
    return [
        *missing,
        "katds / fastest: median (least .. greatest) of the pairs of one turn; below 1 katds is faster",
        "MiB: peak of one forward and backward pass beyond the inputs, gradients included",
        "difference: the greatest of losses and gradients from katds', relative (Frobenius); allowed: "
        + ", ".join(f"{factor} epsilon in {dtype}" for dtype, factor in TOLERANCE.items()),
        "katds also sums the student's entropy, which the others do not",
        "katds and plain take log_softmax in float32; liger-kernel takes it in the type of the weight",
        "liger-kernel has no top-k loss; its JSD with beta 1 is reverse KL over the whole vocabulary",
    ]
