"""The highest values of a whole step, which lie on many ranks: exactly, and the same whoever holds which."""

from __future__ import annotations

import torch

from katds.core.collective import Collective

_SHIFTS = (24, 16, 8, 0)  # a float32 has 32 bits: four digits of eight


def highest(values_T: torch.Tensor, share: float, collective: Collective) -> tuple[torch.Tensor, int, int]:
    """Collective: which values are among the highest `share` of all N values on all ranks.

    The k-th highest value is found, k = share x N rounded to a whole number, at least 1, and all that are at least as high are
    taken: ties at the edge all come in, since any choice among them would depend on who holds them.

    Radix selection on order-preserving integers. Cost: four sums over ranks of 256 counts, and one copy to the host.

    Args:
        values_T: this rank's values, read as float32; T may be 0, and differ between ranks.
        share: above 0, at most 1.

    Returns:
        bool [T] on the device of the values; how many were taken over all ranks; N.
    """
    keys_T = _ordered(values_T)
    inside, edge, wanted, above, total = keys_T, 0, 0, 0, 0
    for shift in _SHIFTS:
        digits = (inside >> shift) & 255
        counts = collective.sum(torch.bincount(digits, minlength=256))
        if shift == _SHIFTS[0]:
            total = int(counts.sum())
            if total == 0:
                return values_T.new_zeros(0, dtype=torch.bool), 0, 0
            wanted = max(1, round(share * total))
        # How many have this digit or a higher one: the edge's is the last digit where that is enough.
        from_here = counts.flip(0).cumsum(0).flip(0)
        digit = int((from_here >= wanted).sum()) - 1
        higher = int(from_here[digit] - counts[digit])
        wanted, above = wanted - higher, above + higher
        inside, edge = inside[digits == digit], edge << 8 | digit
    taken = above + int(counts[digit])
    return (keys_T >= edge).to(values_T.device), taken, total


def _ordered(values_T: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32) on the host, in the order of the float32 values."""
    bits = (values_T.detach().float().cpu() + 0.0).view(torch.int32).long()  # + 0.0: -0 becomes 0
    return torch.where(bits < 0, -1 - bits, bits + 2**31)
