"""`bench phases`: when which slots are live, and that both attentions compute the same thing, which is what a forward computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import Qwen3Config

from katds.bench import attention_time
from katds.bench.attention_time import (
    PROBES,
    Forward,
    SlotAttention,
    decode_forwards,
    learn_katds,
    learn_sdpa,
    learned_lengths,
    live_rows,
    teacher_forwards,
    total,
)
from katds.bench.floors import Products

CPU = torch.device("cpu")
CONFIG = Qwen3Config(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
PROMPT, CHUNK = 5, 4
LIVE = live_rows(Counter({2: 4, 3: 8}))  # three rollouts; one ends in the second chunk, the others in the third


def test_chunks_and_the_keys_that_they_see() -> None:
    assert LIVE == [3] * 8 + [2] * 4
    # Token i of a response is drawn from the query at position PROMPT - 1 + i, which sees PROMPT + i keys.
    assert decode_forwards(LIVE, PROMPT, CHUNK) == [Forward(3, 1, 7, 4), Forward(3, 1, 11, 4), Forward(2, 1, 15, 4)]
    assert teacher_forwards(LIVE, PROMPT, CHUNK) == [Forward(3, 8, 8), Forward(3, 4, 12), Forward(2, 4, 16)]


@pytest.mark.parametrize(("longest", "long"), [(12, 12), (10, 10), (16, 10)])
def test_lengths_are_known_to_the_chunk(longest: int, long: int) -> None:
    """A rollout that has reached the longest length is known exactly."""
    lengths = learned_lengths(LIVE, PROMPT, CHUNK, longest)
    assert lengths == [PROMPT - 1 + long, PROMPT - 1 + long, PROMPT - 1 + 6]


@pytest.mark.parametrize("count", [1, PROBES - 1, PROBES, PROBES + 1, 3 * PROBES + 5])
def test_forwards_that_are_not_timed_are_counted(count: int) -> None:
    timed: list[Forward] = []

    def seconds(forward: Forward) -> float:
        timed.append(forward)
        return 2.0

    forwards = [Forward(1, 1, keys, count=1 + keys % 3) for keys in range(count)]
    assert total(forwards, seconds) == 2 * sum(forward.count for forward in forwards)
    assert min(count, PROBES // 2) <= len(timed) <= PROBES and len(set(timed)) == len(timed)


def test_keys_are_counted_by_hand() -> None:
    slots = SlotAttention(CONFIG, 3, 20, torch.bfloat16, CPU)
    # Keys and values, 3 layers, 2 heads of 32, 2 bytes: 768 bytes a token.
    assert slots.bytes([Forward(3, 1, 7, 4), Forward(2, 4, 16)]) == (4 * 3 * 7 + 2 * 16) * 768


def test_the_whole_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_time, "median_seconds", lambda run, device: len(run()) / 12)
    slots = SlotAttention(CONFIG, 3, 20, torch.float32, CPU)
    assert slots.bandwidth() == 2 * 3 * 2 * 32 * 4 * 3 * 20 / 0.5


def test_every_layer_has_keys_of_its_own() -> None:
    slots = SlotAttention(CONFIG, 2, 9, torch.float32, CPU)
    buffers = [buffer for layer in range(3) for buffer in slots.cache.buffers(layer)]
    assert len({buffer.data_ptr() for buffer in buffers}) == 6
    assert all(buffer.std() > 0.5 for buffer in buffers), "zeros that were never written share one page of memory"


def test_what_turns_cost_is_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts layers and products, and lets both together take ten times as long."""
    slots = SlotAttention(CONFIG, 2, 9, torch.float32, CPU)
    done: list[str] = []
    monkeypatch.setattr(slots, "attend", lambda *arguments: [lambda: done.append("attention")] * 3)
    monkeypatch.setattr(Products, "layers", lambda self, rows, count: [lambda: done.append(f"{rows}")] * (count + 1))
    monkeypatch.setattr(Products, "multiply", lambda self, rows: 0.25)

    def seconds(run: Callable[[], object], device: torch.device) -> float:
        done.clear()
        run()
        return 10.0 * len(done) if done[0] != "attention" else 1.0

    monkeypatch.setattr(attention_time, "median_seconds", seconds)
    assert slots.displaced(Products([]), Forward(2, 1, 7)) == 70 - 1 - 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "forward", [Forward(3, 1, 7), Forward(3, 4, 12), Forward(2, 9, 9)], ids=["decode", "chunk", "prompt"]
)
def test_katds_and_pytorch_compute_the_same_over_slots(forward: Forward, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slots = SlotAttention(CONFIG, 4, 20, dtype, CPU)
    query = slots.query(forward)
    ours, theirs = [layer() for layer in slots.attend(forward, query)], slots.attend_pytorch(forward, query)()
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[0].unflatten(0, (forward.rows, -1)), other.transpose(1, 2))
    assert not torch.equal(ours[0], ours[1])


def test_katds_and_pytorch_learn_the_same() -> None:
    gradients = []
    for learn in (learn_katds, learn_sdpa):
        torch.manual_seed(0)
        gradients.append(learn(CONFIG, [7, 7], torch.float32, CPU)())
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine[0].unflatten(0, (2, 7)), other)
    torch.manual_seed(0)
    shapes = [tuple(gradient.shape) for gradient in learn_sdpa(CONFIG, [7, 3, 7], torch.float32, CPU)()]
    assert shapes == [(2, 7, 4, 32), (2, 7, 2, 32), (2, 7, 2, 32), (1, 3, 4, 32), (1, 3, 2, 32), (1, 3, 2, 32)]
