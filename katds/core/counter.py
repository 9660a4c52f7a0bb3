"""Counter-based random numbers: a number is a hash of what it is for, not of how many were drawn before.

Sampling therefore does not depend on slot, chunk size, rank or world size, and a resumed run needs no generator
state. The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014), on Python integers and, bit for bit the same, on int64 tensors.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """A signed 64-bit key of any number of non-negative integers, e.g. (seed, step, rollout id). Order matters."""
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN + part) & _MASK)
    return _signed(state)


def uniform(key: int, counter: int) -> float:
    """A number in (0, 1), the scalar form of `uniforms`."""
    bits = _mix((key + _GOLDEN * (counter + 1)) & _MASK) >> 41
    return (bits + 0.5) * 2.0**-23


def uniforms(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float32, one per element of int64 `keys` and `counters` (broadcast). A handful of integer operations."""
    x = keys + _signed(_GOLDEN) * (counters + 1)
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    x = x ^ _shift(x, 31)
    # 23 bits and the half fit float32 exactly, so the result is the same on every device; the half keeps 0 and 1 out.
    return (_shift(x, 41).to(torch.float32) + 0.5) * 2.0**-23


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's shift of int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
