"""Rollouts that C code has decoded are those of the model's own forward, for any slots and chunks."""

from __future__ import annotations

import pytest
import torch
from rollout_setup import engine, facts, mixed_requests, models

from katds.models.native.build import Unavailable, library
from katds.models.native.forward import NativeStep
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep

EOS = (5, 23)
SHAPES = [(4, 5), (15, 1), (1, 3), (3, 16), (7, 4)]  # slots, chunk_tokens


def test_rollouts_are_those_of_the_plain_step_for_any_slots_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where one token in some hundred thousand has a random number within rounding of its boundary and flips;
    none of these few hundred has."""
    pair, requests = models(torch.float32), mixed_requests(audit_every=4)
    try:
        library()
    except Unavailable as reason:
        pytest.skip(f"nothing can be compiled: {reason}")
    NativeStep(pair.student, SlotCache(1, 1, torch.device("cpu")))  # this model is one for it
    expected = facts(engine(pair, eos_ids=EOS, fast_decode=False).generate(requests, 1))
    assert sum(len(response) for _, response, *_ in expected) > 150
    monkeypatch.setattr(PlainStep, "__call__", None)  # after the first comparison of the two, all steps are native
    monkeypatch.setattr("katds.models.step.check", lambda *_: None)
    for slots, chunk in SHAPES:
        fast = engine(pair, eos_ids=EOS, slots=slots, chunk_tokens=chunk)
        assert facts(fast.generate(requests, 1)) == expected, (slots, chunk)
