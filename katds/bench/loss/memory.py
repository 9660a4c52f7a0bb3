"""How much memory a contender takes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

from katds.bench.loss.contenders import Inputs, Run


def peak_bytes(run: Run, inputs: Inputs) -> int:
    """What `run` needs at most beyond the inputs: in a fork of this process, or of the allocator on CUDA."""
    import torch

    inputs.base.grad = inputs.weight.grad = None
    gc.collect()
    if inputs.base.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_child, args=(run, sender))
    child.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"a contender ended with exit code {child.exitcode} while its memory was measured") from None
    child.join()
    return peak


def _measure_child(run: Run, sender: Any) -> None:
    before = _resident("VmRSS")
    # Sets the high-water mark to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    sender.send(_resident("VmHWM") - before)
    sender.close()
    os._exit(0)  # what the parent registered to run at its own exit is not ours


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, key
    return int(found[1]) * 1024
