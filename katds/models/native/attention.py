"""Causal attention in C, forward and backward (float32, CPU), for packed sequences and for slots.

PyTorch's attention on the CPU reaches a third of the speed of its matrix products where heads are narrow, and over slots it needs a
mask. This one is checked against it once per process before it is used.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from katds.models.native.build import Unavailable, functions, library

TOLERANCE = 1e-4  # of the size of a result: a thousand roundings; a wrong formula is off by some 1e-1


class _Attention(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in (
                "sgemm", "parallel", "product_threads", "query", "key", "value", "out", "logsum", "grad_out", "grad_query", "grad_key",
                "grad_value", "work", "runs",
            )
        ),
        *(
            (n, ctypes.c_int64)
            for n in (
                "query_token", "query_head", "key_place", "key_token", "key_head", "value_place", "value_token",
                "value_head", "count", "heads", "kv_heads", "dim", "window", "longest", "threads",
            )
        ),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


def serves(query: torch.Tensor) -> bool:
    """Whether attention over such tensors is computed here."""
    return query.dtype == torch.float32 and query.device.type == "cpu" and _unavailable() is None


@cache
def _unavailable() -> str | None:
    """Why it cannot be used."""
    try:
        library()
        functions()
    except Unavailable as reason:
        return str(reason)
    error = _error()
    if error <= TOLERANCE:
        return None
    wrong = f"the attention in C differs from PyTorch's by {error:.1g} of its size"
    warnings.warn(f"{wrong}; PyTorch's is used", stacklevel=2)
    return wrong


def packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, runs: torch.Tensor
) -> torch.Tensor:
    """Sequences laid end to end, each attending causally to itself; differentiable once.

    Args:
        q, k, v: [N, Hq, D] and [N, Hkv, D]; only D must be contiguous.
        runs: int64 [sequences, 4], see `run_table`.

    Returns [N, Hq, D]. Memory: [N, Hq] for the backward; in either direction [64, longest sequence] per thread (backward: twice).
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Packed.apply(q, k, v, scaling, window, runs)  # type: ignore[no-any-return]
    return _forward(_dense(q), _dense(k), _dense(v), scaling, window, runs, None)


def slots(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, runs: torch.Tensor
) -> torch.Tensor:
    """Queries [N, Hq, D] of slots over key and value [slots, Hkv, length, D], a `SlotCache`'s; no gradient. Returns [N, Hq, D]."""
    # As runs of tokens [slots, length, Hkv, D], where a place is a slot.
    return _forward(_dense(q), key.transpose(1, 2), value.transpose(1, 2), scaling, window, runs, None)


def run_table(first: torch.Tensor, queries: torch.Tensor, place: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Runs of successive queries [R, 4]: the row of the first, how many, where their keys lie (packed: the row of key 0; else the slot)
    and how many keys precede the first one's own. All int64 [R]."""
    return torch.stack([first, queries, place, position], 1).contiguous()


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int | None,
        runs: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = _dense(q), _dense(k), _dense(v)
        logsum = q.new_empty(q.shape[:2])
        out = _forward(q, k, v, scaling, window, runs, logsum)
        ctx.save_for_backward(q, k, v, runs, out, logsum)
        ctx.scaling, ctx.window = scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the C attention cannot be differentiated twice; call backward without create_graph=True"
            )
        q, k, v, runs, out, logsum = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_q, grad_k, grad_v = torch.empty(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        _call(
            q, k, v, ctx.scaling, ctx.window, runs, out=out, logsum=logsum, grad_out=grad_out, grad_query=grad_q,
            grad_key=grad_k, grad_value=grad_v,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, runs: torch.Tensor,
    logsum: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    out = torch.empty(q.shape)
    _call(q, k, v, scaling, window, runs, out=out, logsum=logsum)
    return out


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, runs: torch.Tensor,
    **others: torch.Tensor | None,
) -> None:  # fmt: skip
    """k and v: [tokens, Hkv, D], or [places, tokens, Hkv, D]."""
    if not len(runs):
        return
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], (
        f"heads of {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]} dimensions"
    )
    blas, parallel, product_threads = functions()
    place = [x.stride(-3) if x.dim() == 3 else x.stride(0) for x in (k, v)]
    longest, threads = int((runs[:, 1] + runs[:, 3]).max()), torch.get_num_threads()
    attention = _Attention(
        sgemm=blas, parallel=parallel, product_threads=product_threads,
        query=q.data_ptr(), key=k.data_ptr(), value=v.data_ptr(), runs=runs.data_ptr(),
        query_token=q.stride(0), query_head=q.stride(1), key_place=place[0], key_token=k.stride(-3),
        key_head=k.stride(-2), value_place=place[1], value_token=v.stride(-3), value_head=v.stride(-2),
        count=len(runs), heads=q.shape[1], kv_heads=k.shape[-2], dim=q.shape[2], window=window or 0, longest=longest,
        threads=threads, scale=scaling, **{name: x.data_ptr() for name, x in others.items() if x is not None},
    )  # fmt: skip
    code = library()
    code.katds_attention_floats.restype = ctypes.c_int64
    work = torch.empty(code.katds_attention_floats(ctypes.byref(attention), int("grad_out" in others)))
    attention.work = work.data_ptr()
    code.katds_attention(ctypes.byref(attention))


def _error() -> float:
    """How far values and gradients of two sequences are from PyTorch's, relative to their size."""
    # It may be asked for in the middle of a model's forward: neither its mode nor the hooks of activation checkpointing are this one's.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        draw = torch.Generator().manual_seed(0)
        lengths, heads = [70, 3], (4, 2, 2)
        mine, own = ([torch.randn(73, h, 32, generator=draw, requires_grad=True) for h in heads] for _ in range(2))
        for x, y in zip(mine, own, strict=True):
            x.data.copy_(y.data)
        starts = torch.tensor([0, lengths[0]])
        runs = run_table(starts, torch.tensor(lengths), starts, torch.zeros(2, dtype=torch.int64))
        outs = [_Packed.apply(*mine, 0.2, None, runs), _plain(own, lengths)]
        (weights,) = (torch.randn(outs[0].shape, generator=draw),)
        for out in outs:
            (out * weights).sum().backward()
        pairs = [(outs[0].detach(), outs[1].detach()), *((x.grad, y.grad) for x, y in zip(mine, own, strict=True))]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _plain(qkv: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    outs = []
    for sequence in zip(*(x.split(lengths) for x in qkv), strict=True):
        q, k, v = (x.transpose(0, 1) for x in sequence)
        outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True).transpose(0, 1))
    return torch.cat(outs)
