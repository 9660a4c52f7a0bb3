"""Decode steps: every way gives the logits of the model's own forward, and whoever makes them knows when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import FAMILIES, VOCABULARY, qwen
from test_slot_cache import LENGTH, SLOTS, Texts

from katds.models.causal import FlatCausalLM
from katds.models.graph_step import GraphStep, StaticStep, bucket
from katds.models.native.build import Unavailable
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep, Step, StepMaker, check, tolerance

CPU = torch.device("cpu")
# Where it can be had, what is replayed on CUDA; everywhere, what is recorded there.
WAYS = [pytest.param(StaticStep, "cpu"), pytest.param(GraphStep, "cuda", marks=pytest.mark.gpu)]


class Stepped(Texts):
    """Texts whose single steps go through a `Step`."""

    def __init__(self, way: Callable[..., Step], *args: Any) -> None:
        super().__init__(*args)
        self._step = way(self.model, self.cache)

    def step(self, slots: int, slack: int) -> None:
        positions = torch.tensor([len(ids) for ids in self.ids[:slots]], device=self.device)
        new = self.tokens(slots)
        seen = self._step(torch.tensor(new, device=self.device), positions, int(positions.max()) + 1).clone()
        weight, bias = self.model.head_parameters()
        torch.testing.assert_close(torch.nn.functional.linear(self._step.hidden, weight, bias), seen)
        for slot, token in enumerate(new):
            self.ids[slot].append(token)
            self.logits[slot].append(seen[slot])


def flat(dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any) -> FlatCausalLM:
    return FlatCausalLM(qwen("katds", **options).to(device, dtype).eval(), VOCABULARY)


@pytest.mark.parametrize("slots", [1, 5, 16, 40, 256])
def test_buckets(slots: int) -> None:
    sizes = [bucket(live, slots) for live in range(1, slots + 1)]
    assert all(live <= size <= min(slots, max(2 * live, 16), live + 15) for live, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and sizes[-1] == slots
    assert [bucket(live, 300) for live in (1, 2, 3, 5, 9, 16, 17, 33, 256)] == [1, 2, 4, 8, 16, 16, 32, 48, 256]


@torch.no_grad()
@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_equals_full_forwards(family: Any, seed: int, way: Any, device: str) -> None:
    """Slots that fill, end, move and are filled again, with idle rows in the free ones."""
    model, plain = (family(attention).to(device, torch.float64).eval() for attention in ("katds", "exact"))
    Stepped(way, FlatCausalLM(model, VOCABULARY), seed, device).play(plain)


@torch.no_grad()
@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_static_step_equals_a_plain_one_for_any_number_of_slots(bias: bool, way: Any, device: str) -> None:
    model = flat(device=device, vocabulary=VOCABULARY + 7)
    if bias:
        model.head.bias = torch.nn.Parameter(torch.randn(VOCABULARY + 7, device=device, dtype=torch.float64))
    caches = [SlotCache(21, LENGTH, torch.device(device)) for _ in range(2)]
    step, plain = way(model, caches[0]), PlainStep(model, caches[1])
    buffers = set()
    for at, live in enumerate((21, 20, 17, 16, 9, 3, 1)):
        tokens = torch.arange(live, device=device) * 5 % VOCABULARY
        positions = torch.full((live,), at, device=device)
        logits = step(tokens, positions, at + 1)
        buffers.add(logits.data_ptr())
        torch.testing.assert_close(logits, plain(tokens, positions, at + 1), rtol=0, atol=1e-10)
    assert len(buffers) == 1, "the logits have no place of their own"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_replay_the_eager_step_bit_for_bit(dtype: torch.dtype) -> None:
    """At full buckets, where both compute the same shapes."""
    model = flat(dtype, "cuda", head_dim=64)
    caches = [SlotCache(16, 600, torch.device("cuda")) for _ in range(2)]
    step, static = GraphStep(model, caches[0]), StaticStep(model, caches[1])
    for at in range(300):  # more than a page
        live = 16 if at < 200 else 8
        tokens = (torch.arange(live, device="cuda") * 5 + at) % VOCABULARY
        positions = torch.full((live,), at, device="cuda")
        assert torch.equal(step(tokens, positions, at + 1), static(tokens, positions, at + 1)), at


@pytest.mark.gpu
@torch.no_grad()
def test_a_slot_gives_the_same_logits_whatever_the_others_hold() -> None:
    """One pass over the keys (num_splits=1): attention does not depend on the batch; the matrix products have one shape here."""
    model = flat(torch.bfloat16, "cuda", head_dim=64)
    seen = []
    for others in (1, 900):
        texts = Stepped(StaticStep, model, 0, "cuda", 1200)
        texts.feed(0, [[7] * 30, [3] * others, [5] * others, [9] * others, [1] * others], 0)
        for _ in range(20):
            texts.step(SLOTS, 0)
        seen.append(torch.stack(texts.logits[0][30:]))
    assert torch.equal(*seen)


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_that_looks_at_the_device_cannot_be_recorded() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model, said = flat(torch.bfloat16, "cuda", head_dim=64, rope_parameters=rope), []
    step = StepMaker(True, False, said.append)(model, 4, 64, torch.device("cuda")).step
    assert isinstance(step, PlainStep) and "CUDA graph" in said[0]
    step(torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda"), 1)
    torch.cuda.synchronize()  # the device has survived it


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(Unavailable, match="cpu"):
        GraphStep(flat(), SlotCache(2, LENGTH, CPU))


class Wrong(StaticStep):
    """Forgets one thing."""

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        return super().__call__(tokens, positions.clamp(max=4), longest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [2, 24])
def test_the_check_tells_rounding_from_error(dtype: torch.dtype, layers: int) -> None:
    """The reference rounds elsewhere: it is one forward in another order of summation."""
    model = flat(dtype, layers=layers)
    check(StaticStep, model)
    with pytest.raises(Unavailable, match="differ from the model's own"):
        check(Wrong, model)
    exact = flat(layers=layers)
    texts, rounded = (Texts(m, 0) for m in (exact, model))
    for each in (texts, rounded):
        each.feed(0, [each.tokens(6)] * SLOTS, SLOTS)
    error = (rounded.seen().double() - texts.seen()).norm(dim=-1) / texts.seen().norm(dim=-1)
    assert error.max() < tolerance(dtype), "rounding alone would fail the check"


@torch.no_grad()
def test_a_way_that_does_not_serve_is_given_up_with_a_word() -> None:
    said: list[str] = []
    make = StepMaker(True, False, said.append)
    for _ in range(2):
        assert isinstance(make(flat(), 2, LENGTH, CPU).step, PlainStep)  # float64 is nothing for C
    assert len(said) == 1 and "float64" in said[0]
    assert isinstance(StepMaker(False, False, said.append)(flat(), 2, LENGTH, CPU).step, PlainStep) and len(said) == 1


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_cache_and_step_are_kept_while_they_fit_and_the_weights_stay(fast: bool) -> None:
    model, other = flat(torch.float32), flat(torch.float32)
    make = StepMaker(fast, True, lambda _: None)
    made = make(model, 4, 30, CPU)
    assert make(model, 3, 20, CPU) is made
    larger = make(model, 2, 40, CPU)
    assert larger is not made and (larger.cache.slots, larger.cache.length) == (4, 40)
    assert make(model, 4, 40, CPU) is larger
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    moved = make(model, 4, 40, CPU)
    assert moved.cache is not larger.cache
    assert make(other, 4, 40, CPU).cache is not moved.cache
    fresh = StepMaker(fast, False, lambda _: None)
    assert fresh(model, 4, 30, CPU).cache is not fresh(model, 4, 30, CPU).cache


class Pretended:
    """torch.cuda's part in recording, as documented: a context in which work is noted and not done, and replays of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted: list[list[Any]] | None = None
        self.replays, self.mode = 0, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Stream": lambda device: stream, "current_stream": lambda device: stream, "stream": lambda stream: nullcontext(),
            "graph_pool_handle": lambda: "pool", "CUDAGraph": lambda: SimpleNamespace(work=[], replay=None),
            "get_sync_debug_mode": lambda: self.mode, "set_sync_debug_mode": self._set, "graph": self._graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def _set(self, mode: Any) -> None:
        self.mode = mode

    @contextmanager
    def _graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert pool == "pool" and self.mode == 0 and capture_error_mode == "thread_local"
        self.noted = graph.work
        yield
        self.noted = None

        def replay() -> None:
            self.replays += 1
            for work in graph.work:
                work()

        graph.replay = replay


@torch.no_grad()
def test_recording_and_replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things around a graph, without one."""
    cuda, model = Pretended(monkeypatch), flat()
    modes: list[Any] = []

    class Step(GraphStep):
        def _forward(self, size: int) -> None:
            modes.append(cuda.mode)
            if cuda.noted is None:
                super()._forward(size)
            else:
                cuda.noted.append(partial(super()._forward, size))

    caches = [SlotCache(6, LENGTH, CPU) for _ in range(2)]
    caches[0].device = torch.device("cuda")
    step, plain = Step(model, caches[0]), PlainStep(model, caches[1])
    caches[0].device = CPU
    for at, live in enumerate((6, 6, 5, 3, 3, 2)):
        tokens, positions = torch.arange(live) * 5 + at, torch.full((live,), at)
        torch.testing.assert_close(step(tokens, positions, 1), plain(tokens, positions, at + 1), rtol=0, atol=1e-10)
    assert sorted(step._graphs) == [2, 4, 6] and cuda.replays == 3
    # Of each size: at once, on the side stream where a look at the device is an error, and noted.
    assert modes[:3] == [0, "error", 0] and modes.count("error") == 3

    class Looking(GraphStep):
        def _forward(self, size: int) -> None:
            if cuda.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nat some place")

    caches[0].device = torch.device("cuda")
    looking = Looking(model, caches[0])
    caches[0].device = CPU
    with pytest.raises(Unavailable, match=r"CUDA graph \(called a synchronizing CUDA operation\)$"):
        looking(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 1)
    assert cuda.mode == 0 and not looking._graphs
