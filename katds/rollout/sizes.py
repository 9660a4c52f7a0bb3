"""What a rollout engine is given to work with, and what it counts while it works."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from katds.rollout.sampling import Sampling


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes of one engine.

    keep_decoder: between phases, keep the student's cache and whatever was made for its decode steps (CUDA graphs). Only for a
    student whose weights stay where they are; the learner then has that much less memory.
    top_k: tokens that the divergence is on, beside a tail bucket.
    teacher_top_k: K of Need.TEACHER_TOP_K; None: top_k.
    overlap: decode the next chunk while the teacher reads the last one. A rollout that has ended then writes one more in vain.
    """

    slots: int
    chunk_tokens: int
    eos_ids: tuple[int, ...]
    sampling: Sampling
    top_k: int
    seed: int
    device: torch.device
    keep_divergences: bool = True
    fast_decode: bool = True
    keep_decoder: bool = False
    overlap: bool = False
    teacher_top_k: int | None = None


@dataclass(slots=True)
class EngineStats:
    """What one call of `generate` did on this rank. Tokens are those written into rollouts; decoded ones include overshoot."""

    rounds: int = 0
    tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: Counter[int] = field(default_factory=Counter)  # live rows -> token steps with so many
    teacher_tokens: Counter[int] = field(default_factory=Counter)  # tokens of a teacher forward -> forwards
