"""Attention kernels for packed training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from katds.bench.gpu.counts import attention_flops
from katds.bench.gpu.machine import Bench, Case, Shape, students
from katds.models.attention import is_flash


def cases(bench: Bench) -> Iterator[Case]:
    shape = next(reversed(students(bench).values()))
    for length in (16,) if bench.toy else (512, 2048, 8192):
        for name, kernel in _kernels(bench).items():
            yield f"16k tokens of {length}, {name}", partial(_attention, bench, shape, kernel, length)


def _kernels(bench: Bench) -> dict[str, Callable[..., Any]]:
    """Causal attention (q, k, v, bounds, longest) over packed sequences."""
    if not is_flash(torch.empty(0, dtype=bench.dtype, device=bench.device)):
        return {"sdpa": _sdpa}
    from torch.nn.attention.varlen import varlen_attn

    kernels: dict[str, Callable[..., Any]] = {
        "torch varlen": lambda q, k, v, bounds, n: varlen_attn(
            q, k, v, bounds, bounds, n, n, window_size=(-1, 0), enable_gqa=True
        )
    }
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        kernels["flash-attn"] = lambda q, k, v, bounds, n: flash_attn_varlen_func(
            q, k, v, bounds, bounds, n, n, causal=True
        )
    return kernels


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _attention(bench: Bench, shape: Shape, kernel: Callable[..., Any], length: int) -> dict[str, Any]:
    tokens = 64 if bench.toy else 16384
    q, k, v = (
        torch.randn(tokens, heads, shape.dim, device=bench.device).to(bench.dtype).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=bench.device)

    def step() -> None:
        kernel(q, k, v, bounds, length).sum().backward()
        q.grad = k.grad = v.grad = None

    return bench.timed(step, tokens, attention_flops(tokens, length, shape.heads, shape.dim))
