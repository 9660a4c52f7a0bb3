"""Attention over packed sequences and over slots, as one function that transformers models call through their
attention interface (`attn_implementation="katds"`). The models themselves stay untouched.

A plan of `katds.models.plans`, passed through the model as a keyword argument, says which tokens belong together.

On CUDA both kinds go to flash attention: torch's varlen kernel, or for training the flash-attn package where it is installed. On the
CPU float32 goes to C code where there is a compiler. Everything else is `scaled_dot_product_attention`, sequence by sequence or slots
side by side, without an N x N mask.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from katds.models.native import attention as native
from katds.models.plans import PackedPlan, SlotGroup, SlotPlan

NAME = "katds"
_UNSUPPORTED = ("s_aux", "softcap", "position_bias", "head_mask")  # attention sinks, capped scores and the like
FLASH_TYPES = (torch.bfloat16, torch.float16)


def has_flash(device: torch.device) -> bool:
    """Whether there are flash kernels on this device."""
    return device.type == "cuda"


def is_flash(tensor: torch.Tensor) -> bool:
    """Whether attention over such tensors goes to a flash kernel: they know no other types and devices."""
    return has_flash(tensor.device) and tensor.dtype in FLASH_TYPES


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    plan: PackedPlan | SlotPlan | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls: query [1, Hq, N, D]; returns [1, N, Hq, D].

    Under a `PackedPlan` key and value are [1, Hkv, N, D]; under a `SlotPlan` they are what `SlotCache.update` returned.
    """
    assert plan is not None, f"{type(module).__name__} does not pass keyword arguments on to its attention function"
    assert attention_mask is None and dropout == 0.0, "katds attention takes neither a mask nor dropout"
    q = query[0].transpose(0, 1)  # [N, Hq, D]
    unknown = [name for name in _UNSUPPORTED if others.get(name) is not None]
    assert not unknown, f"{type(module).__name__} asks for {unknown}, which katds attention does not compute"
    flash, in_c = is_flash(q), native.serves(q)
    if isinstance(plan, SlotPlan):
        slots = _slots_varlen if flash else _slots_native if in_c else _slots_sdpa
        out = slots(q, key, value, scaling, sliding_window, plan)
    else:
        packed = _packed_varlen if flash else _packed_native if in_c else _packed_sdpa
        over_all = partial(packed, scaling=scaling, window=sliding_window, plan=plan)
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        out = over_all(q, k, v) if plan.shards is None else plan.shards.attend(over_all, q, k, v)
    return out.unsqueeze(0), None


def _packed_native(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, plan: PackedPlan
) -> torch.Tensor:
    return native.packed(q, k, v, scaling, window, plan.runs)


def _slots_native(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, plan: SlotPlan
) -> torch.Tensor:
    return native.slots(q, key, value, scaling, window, plan.runs)


def _packed_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, plan: PackedPlan
) -> torch.Tensor:
    # split, not slices: its backward is one concatenation instead of a zero-padded gradient per sequence.
    lengths = [end - start for start, end in pairwise(plan.bounds)]
    outs = []
    for sequence in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in sequence)
        length, mask = qs.shape[2], None
        if window is not None and length > window:
            at = torch.arange(length, device=q.device)
            gap = at[:, None] - at[None, :]
            mask = (gap >= 0) & (gap < window)
        o = scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs) if outs else torch.zeros_like(q)


def _slots_sdpa(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, plan: SlotPlan
) -> torch.Tensor:
    outs = [_group_sdpa(q, key, value, scaling, window, plan.keys, group) for group in plan.groups]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _group_sdpa(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    keys: int,
    group: SlotGroup,
) -> torch.Tensor:
    q = q[group.tokens]
    heads, dim = q.shape[1:]
    at = slice(group.first_slot, group.first_slot + group.slots)
    k, v = key[at, :, :keys], value[at, :, :keys]  # [slots, Hkv, keys, D]
    # Query heads that share a key head are stacked along the query axis: no key or value is copied for them.
    kv_heads = k.shape[1]
    share = heads // kv_heads
    bias = group.bias(keys, share, window, q.dtype)
    if group.width == 1 and group.scatter is None:  # a decode step, where every operation counts
        stacked = q.view(group.slots, kv_heads, share, dim)
        out = scaled_dot_product_attention(stacked, k, v, attn_mask=bias, scale=scaling)
        return out.reshape(group.slots, heads, dim)
    if group.scatter is None:
        square = q.view(group.slots, group.width, heads, dim)
    else:
        square = q.new_zeros(group.slots, group.width, heads, dim)
        square[group.scatter] = q
    stacked = square.view(group.slots, group.width, kv_heads, share, dim).permute(0, 2, 3, 1, 4)
    stacked = stacked.reshape(group.slots, kv_heads, share * group.width, dim)
    out = scaled_dot_product_attention(stacked, k, v, attn_mask=bias, scale=scaling)
    out = out.view(group.slots, kv_heads, share, group.width, dim).permute(0, 3, 1, 2, 4)
    if group.scatter is None:
        return out.reshape(group.slots * group.width, heads, dim)
    return out.reshape(group.slots, group.width, heads, dim)[group.scatter]


def _packed_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, plan: PackedPlan
) -> torch.Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bounds, longest, left = plan.cu_seqlens, plan.longest, -1 if window is None else window - 1
    out: torch.Tensor
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True, window_size=(left, 0)
        )
        return out
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True)  # type: ignore[assignment]
    return out


def _slots_varlen(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None, plan: SlotPlan
) -> torch.Tensor:
    """One pass over the keys per query (num_splits=1), for two reasons. A slot's result is then the same to the last bit
    whatever the other slots hold. And torch 2.13's FA2 writes wrong results over a paged cache when it splits
    (pytorch/pytorch#194167). The price is idle multiprocessors where slots x key heads are fewer than these.
    """
    from torch.nn.attention import current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    assert plan.varlen is not None
    paged = plan.varlen
    page = key.shape[1] // paged.block_table.shape[1]
    left = -1 if window is None else window - 1
    # A single query is the last token of its slot and sees all keys. Without a bound on its right, FA2 reads the keys once for all
    # query heads that share them.
    right = -1 if paged.single else 0
    # FA2 wants the bounds of keys that it then does not look at; its successors refuse them.
    bounds_k = paged.cu_seqlens_k if current_flash_attention_impl() in (None, "FA2") else None
    out = varlen_attn(
        q.contiguous(), key.view(-1, page, *key.shape[2:]), value.view(-1, page, *value.shape[2:]), paged.cu_seqlens_q, bounds_k,
        paged.longest_q, plan.keys, scale=scaling, window_size=(left, right), enable_gqa=True,
        seqused_k=paged.seqused_k, block_table=paged.block_table, num_splits=1,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


AttentionInterface.register(NAME, attend)
