"""Every collective of a process with its bytes, seen where all of them pass: PyTorch's own operators below torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Adds up what this rank receives from others, or in a reduce-scatter gives away, by (label, operator, ranks of its group).

    A ring is assumed where the library has a choice: an all-gather passes on each part once, an all-reduce twice.
    """

    def __init__(self, label: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str, int]] = Counter()
        self.calls: Counter[tuple[str, str, int]] = Counter()
        self._label = label

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._see(function._opname, args)
        return function(*args, **(kwargs or {}))

    def _see(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        size, rank = group.size(), group.rank()
        first = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
        second = sum(t.nbytes for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)) if len(args) > 1 else 0
        if name in ("_allgather_base_", "allgather_"):  # what comes out; a part of it is this rank's
            moved = first * (size - 1) // size
        elif name == "_reduce_scatter_base_":  # what goes in
            moved = second * (size - 1) // size
        elif name == "allreduce_":
            moved = 2 * first * (size - 1) // size
        elif name == "alltoall_base_":
            output, _, _, of_output, _ = args[:5]
            rows = of_output or [output.shape[0] // size] * size
            moved = (sum(rows) - rows[rank]) * (output.nbytes // max(1, output.shape[0]))
        elif name in ("recv_", "broadcast_"):
            moved = first
        elif name in ("send", "barrier"):
            moved = 0
        else:
            raise AssertionError(f"{name} is not known here")
        key = (self._label(), name, size)
        self.bytes[key] += moved
        self.calls[key] += 1

    def taken(self) -> tuple[Counter[tuple[str, str, int]], Counter[tuple[str, str, int]]]:
        """Bytes and calls since the last time."""
        found = (self.bytes, self.calls)
        self.bytes, self.calls = Counter(), Counter()
        return found


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in value._type().name()
