"""The least that a model's forwards can cost: their matrix products alone, on the same shapes and the same machine.

What lies between a phase and its floor is attention, norms, activations, sampling, Python, and waiting.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPETITIONS = 5
TALL = 512  # rows above which the time of a product is taken to grow in proportion


@dataclass
class Products:
    """The weights [out, in] that every token of a forward is multiplied with, in the order of use."""

    weights: list[torch.Tensor]

    @classmethod
    def of(cls, config: Any, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Products:
        """Random weights of the shapes of a model with this transformers configuration; the head has `vocabulary` rows."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = [tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        head = (vocabulary, model.get_output_embeddings().weight.shape[1])
        return cls([torch.randn(shape, dtype=dtype, device=device) for shape in (*shapes, head)])

    @property
    def bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    def seconds(self, rows: int) -> float:
        """Median time of one forward's products with `rows` tokens."""
        import torch

        tall = min(rows, TALL)
        weights = self.weights
        inputs = {w.shape[1]: torch.randn(tall, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
        taken = []
        with torch.inference_mode():
            for _ in range(REPETITIONS + 1):
                start = time.perf_counter()
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)
                if weights[0].is_cuda:
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:]) * rows / tall

    def total(self, forwards: Mapping[int, float]) -> float:
        """Seconds of {rows: how many forwards with so many}. Of many sizes a few are timed, the others interpolated."""
        sizes = sorted(rows for rows in forwards if rows > 0)
        if not sizes:
            return 0.0
        probes = sorted({sizes[round(i * (len(sizes) - 1) / 7)] for i in range(8)})
        known = {rows: self.seconds(rows) for rows in probes}
        return sum(count * _between(known, rows) for rows, count in forwards.items() if rows > 0)


def _between(known: Mapping[int, float], rows: int) -> float:
    below = max(k for k in known if k <= rows)
    above = min(k for k in known if k >= rows)
    if below == above:
        return known[rows]
    return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)
