"""The least that a model's forwards can cost on this machine: their matrix products alone, of the same shapes; and on CUDA no less
than reading the weights.

What lies between a phase and its floor is attention with its keys and values, norms, activations, sampling, Python, and waiting.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPETITIONS = 5
TALL = 512  # rows above which the time of a product is taken to grow in proportion
COPIED = 1 << 30  # bytes, many times what a cache holds


@dataclass
class Products:
    """The weights [out, in] that every token of a forward is multiplied with, in the order of use.

    Args:
        bandwidth: bytes/s at which they are read at most.
    """

    weights: list[torch.Tensor]
    bandwidth: float = math.inf

    @classmethod
    def of(cls, config: Any, vocabulary: int, dtype: torch.dtype, device: torch.device, bandwidth: float) -> Products:
        """Random weights of the shapes of a model with this transformers configuration; the head has `vocabulary` rows."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = [tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        head = (vocabulary, model.get_output_embeddings().weight.shape[1])
        return cls([torch.randn(shape, dtype=dtype, device=device) for shape in (*shapes, head)], bandwidth)

    @property
    def bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    def seconds(self, rows: int) -> float:
        """Of one forward with `rows` tokens."""
        tall = min(rows, TALL)
        return max(self.multiply(tall) * rows / tall, self.bytes / self.bandwidth)

    def multiply(self, rows: int) -> float:
        """Median seconds of the products with `rows` tokens."""
        import torch

        device, (forward,) = self.weights[0].device, self.layers(rows, 0)
        with torch.inference_mode():
            return median_seconds(recorded(forward) if device.type == "cuda" else forward, device)

    def layers(self, rows: int, count: int) -> list[Callable[[], None]]:
        """The products with `rows` tokens of each of `count` layers, which are alike, and of what is left: the head, or with no layers
        all."""
        import torch

        weights, device = self.weights, self.weights[0].device
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=device) for w in weights}
        size = (len(weights) - 1) // max(count, 1)
        bounds = [size * layer for layer in range(count + 1)]

        def multiply(part: list[torch.Tensor]) -> None:
            for weight in part:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        parts = [weights[low:high] for low, high in zip(bounds, [*bounds[1:], len(weights)], strict=True)]
        return [partial(multiply, part) for part in parts]

    def total(self, forwards: Mapping[int, float]) -> float:
        """Seconds of {rows: how many forwards with so many}. Of many sizes a few are timed, the others interpolated."""
        sizes = sorted(rows for rows in forwards if rows > 0)
        if not sizes:
            return 0.0
        probes = sorted({sizes[round(i * (len(sizes) - 1) / 7)] for i in range(8)})
        known = {rows: self.seconds(rows) for rows in probes}
        return sum(count * _between(known, rows) for rows, count in forwards.items() if rows > 0)


def copy_bandwidth(device: torch.device, size: int = COPIED) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes within the device."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of a few calls, after one that is not counted."""
    import torch

    taken = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """As a CUDA graph: to launch a small kernel takes longer than to compute it."""
    import torch

    run()  # libraries set themselves up, which must not be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog looks at events meanwhile
        run()
    replay: Callable[[], Any] = graph.replay
    return replay


def _between(known: Mapping[int, float], rows: int) -> float:
    below = max(k for k in known if k <= rows)
    above = min(k for k in known if k >= rows)
    if below == above:
        return known[rows]
    return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)
