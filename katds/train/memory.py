"""How much memory a run has needed so far."""

from __future__ import annotations

import resource

import torch

from katds.core.collective import Collective


def peak_memory_bytes(collective: Collective, device: torch.device) -> int:
    """Collective: the largest peak of any rank since its process began: device memory on CUDA, resident memory elsewhere."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    return int(collective.max(torch.tensor([peak])).item())
