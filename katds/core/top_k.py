"""The K largest of each row, without a selection over the whole row."""

from __future__ import annotations

import torch


def top_k(values_SV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row and their indices (int64), both [S, k], in no particular order. k <= V.

    Exact. The row is cut into blocks of B, and only the k blocks with the largest maxima are searched. Proof: let x lie
    in another block. The maxima of the k searched blocks are k elements, each at least the maximum of x's block, hence
    at least x; so the k largest candidates are, as values, the k largest of the row. Of equal values any may be
    taken; which ones is a function of the row, on CPU and as far as `torch.topk` keeps to that on other devices. NaN
    counts as larger than all numbers, as in `torch.topk`, since a block with a NaN has the maximum NaN.

    Cost: one pass of vectorised maxima, then selections among V / B and k B instead of V elements. No synchronisation.
    """
    rows, vocabulary = values_SV.shape
    block = _block(vocabulary, k)
    if block == 1:
        return torch.topk(values_SV, k, dim=-1, sorted=False)
    blocks = vocabulary // block
    # Block b holds b, b + blocks, b + 2 blocks, ...: maxima of neighbouring blocks are then one vector instruction.
    maxima = values_SV[:, : blocks * block].unflatten(-1, (block, blocks)).amax(-2)
    chosen_SK = maxima.topk(k, dim=-1, sorted=False).indices
    steps_B = torch.arange(0, blocks * block, blocks, device=values_SV.device)
    ids = (chosen_SK[:, None, :] + steps_B[:, None]).flatten(1)
    if blocks * block < vocabulary:  # what fits no block is always searched
        rest = torch.arange(blocks * block, vocabulary, device=values_SV.device)
        ids = torch.cat([ids, rest.expand(rows, -1)], dim=-1)
    best = values_SV.gather(-1, ids).topk(k, dim=-1, sorted=False)
    return best.values, ids.gather(-1, best.indices)


def _block(vocabulary: int, k: int) -> int:
    """B: the power of two up to sqrt(V / k), where V / B + k B is least, but at most 16. 1: blocks do not pay.

    Measured on one CPU thread with fresh random rows, microseconds for S rows, `torch.topk` against this function:

    |      V |  k | S = 1    | S = 16     | S = 64      |
    |   2048 | 16 | 10, 22   | 106, 101   | 406, 363    |
    |   2048 | 64 | 22, 29   | 295, 176   | 1178, 626   |
    |  16384 | 16 | 38, 30   | 425, 207   | 1533, 756   |
    |  16384 | 64 | 56, 45   | 708, 437   | 2759, 1607  |
    |  32768 | 16 | 68, 35   | 745, 266   | 2954, 1012  |
    |  32768 | 64 | 88, 55   | 1074, 692  | 4227, 2719  |
    | 151936 | 16 | 265, 70  | 2919, 792  | 11453, 3766 |
    | 151936 | 64 | 289, 102 | 3314, 1190 | 13004, 5802 |

    Blocks of 32 and 64 were slower than of 16 everywhere, blocks of 2 hardly faster than none. A function of the row's
    length alone: with S in it, which of equal values are taken would depend on the batch.
    """
    block = 1
    while block < 16 and (2 * block) ** 2 * k <= vocabulary:
        block *= 2
    return block if block >= 4 else 1
