"""The forward in C is the model's own: logits, keys and values, of steps, prompts and chunks, in every variant of its families; whoever
it does not understand is refused with a reason."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from katds.models.causal import FlatCausalLM, linear
from katds.models.native.build import Unavailable, functions, library
from katds.models.native.forward import NativeForward, NativeStep
from katds.models.plans import SlotPlan
from katds.models.slot_cache import SlotCache, ragged_plan
from katds.models.step import ForwardMaker, PlainStep, StepMaker

VOCABULARY = 65
WINDOW = 4
CPU = torch.device("cpu")
LENGTH = 80  # more than a block of keys
CANARY = 7.0

try:
    library()
except Unavailable as reason:
    pytest.skip(f"no native step: {reason}", allow_module_level=True)


def build(family: str, **changes: Any) -> FlatCausalLM:
    """A small model whose every parameter matters; its head has more rows than the vocabulary."""
    torch.manual_seed(5)
    shape = {
        "vocab_size": VOCABULARY + 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 1,
        "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{**shape, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="katds").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.3)
    return FlatCausalLM(model.requires_grad_(False), VOCABULARY)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
VARIANTS: dict[str, Callable[[], FlatCausalLM]] = {
    "llama": lambda: build("llama"),
    "llama-tied": lambda: build("llama", tie_word_embeddings=True),
    "llama-biases": lambda: build("llama", attention_bias=True, mlp_bias=True),
    "llama-one-key-head": lambda: build("llama", num_key_value_heads=1, head_dim=32),
    "llama-own-key-heads": lambda: build("llama", num_key_value_heads=4, head_dim=64),
    "llama-wide-heads": lambda: build("llama", head_dim=128, num_attention_heads=8),
    "llama-widest-heads": lambda: build("llama", head_dim=256),
    "llama-still-wider-heads": lambda: build("llama", head_dim=288),
    "llama-odd-sizes": lambda: build("llama", hidden_size=20, head_dim=6, intermediate_size=23, num_hidden_layers=3),
    "llama-linear": lambda: build("llama", **rope("linear")),
    "llama-llama3": lambda: build("llama", **LLAMA3),
    "llama-yarn": lambda: build("llama", **rope("yarn", original_max_position_embeddings=32)),
    "mistral": lambda: build("mistral", sliding_window=None),
    "mistral-window": lambda: build("mistral", sliding_window=WINDOW, head_dim=12),
    "mistral-window-of-one": lambda: build("mistral", sliding_window=1),
    "qwen2": lambda: build("qwen2"),
    "qwen2-window": lambda: build("qwen2", **SLIDING),
    "qwen3": lambda: build("qwen3", head_dim=32),
    "qwen3-tied": lambda: build("qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3-biases": lambda: build("qwen3", head_dim=8, attention_bias=True),
    "qwen3-window": lambda: build("qwen3", head_dim=8, **SLIDING),
    "qwen3-yarn": lambda: build("qwen3", head_dim=32, **rope("yarn", original_max_position_embeddings=16)),
}


def exact(model: FlatCausalLM) -> FlatCausalLM:
    """The same in float64, also where transformers computes in float32 whatever the model."""

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    twin = FlatCausalLM(copy.deepcopy(model.model), VOCABULARY).double()
    for module in twin.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)
    return twin


def play(model: FlatCausalLM, way: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits, then all keys and values, of a rollout phase in small: prompts, of which two slots share one, steps, a slot that ends
    and is filled anew, and chunks of several tokens as a teacher reads them."""
    cache = SlotCache(5, LENGTH, CPU)
    generator = torch.Generator().manual_seed(3)
    step, logits = way(model, cache), []
    forward = step.forward if isinstance(step, NativeStep) else model

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (count,), generator=generator)

    def read(first: int, starts: list[int], counts: list[int], copies: Any = (), rows: Any = None) -> None:
        plan, positions = ragged_plan(cache, first, starts, counts, 0, copies)
        logits.append(forward(tokens(sum(counts)), positions, plan, linear, rows, cache))

    def steps(count: int, places: list[int]) -> list[int]:
        for _ in range(count):
            logits.append(step(tokens(len(places)), torch.tensor(places), max(places) + 1).clone())
            places = [place + 1 for place in places]
        return places

    with torch.inference_mode():
        read(0, [0] * 5, [7, 1, 62, 3, 9], [(0, 1, 5)])
        steps(3, [0] * 3)  # what a prompt has written is overwritten
        places = steps(9, [7, 5, 62, 3, 9])
        cache.move(4, 1, places[4])
        places = steps(5, [places[0], places[4], *places[2:4]])
        read(4, [0], [5], rows=torch.tensor([1, 4]))
        places = steps(4, [*places, 5])[:2]
        read(0, places, [30, 4])
        read(1, [places[1] + 4], [1])
        buffers = [buffer for layer in range(len(model.model.base_model.layers)) for buffer in cache.buffers(layer)]
        return torch.cat(logits), torch.stack(buffers)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_as_exact_as_the_models_own(name: str) -> None:
    model = VARIANTS[name]()
    native, plain, true = play(model, NativeStep), play(model, PlainStep), play(exact(model), PlainStep)
    for mine, own, right in zip(native, plain, true, strict=True):
        assert mine.dtype == torch.float32 and right.dtype == torch.float64
        assert (mine - right).norm() <= 2 * (own - right).norm() < 1e-4 * right.norm()
        # One number alone is a matter of luck; what is wrong in one place only is not within a multiple of rounding.
        assert (mine - right).abs().max() <= 4 * (own - right).abs().max()


def guard(step: NativeStep, rows: int) -> torch.Tensor:
    """Moves the step's work space; returns what lies behind its end."""
    size = library().katds_forward_floats(ctypes.byref(step.forward._model), ctypes.c_int64(rows))
    work = torch.full((size + 10_000,), CANARY)
    step.forward._work = work
    return work[size:]


def test_threads_change_no_bit_of_attention() -> None:
    """With more rows than threads, and keys enough for threads to be worth it."""
    model, rows, length = build("qwen3", head_dim=64), 7, 1200
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        cache = SlotCache(rows, length, CPU)
        cache.reserve(2, 2, 64, torch.float32)
        for i, buffer in enumerate([*cache.buffers(0), *cache.buffers(1)]):
            buffer.normal_(generator=torch.Generator().manual_seed(i))
        torch.set_num_threads(count)
        try:
            step = NativeStep(model, cache)
            canary = guard(step, rows)
            positions = torch.arange(rows) + length - 100
            torch.set_num_threads(1)  # of the matrix products
            logits = [step(torch.arange(rows), positions + i, length) for i in range(5)]
        finally:
            torch.set_num_threads(threads)
        assert (canary == CANARY).all(), "the work space is too small"
        results.append(torch.stack([*logits]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_weights_may_be_views_of_a_larger_storage() -> None:
    """As those of a gathered ZeRO-3 model are, at any multiple of their size."""
    model = VARIANTS["qwen2-window"]()
    expected, _ = play(model, NativeStep)
    flat = torch.cat([torch.zeros(1), *(p.data.flatten() for p in model.parameters())])
    at = 1
    for parameter in model.parameters():
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    torch.testing.assert_close(play(model, NativeStep)[0], expected, rtol=0, atol=1e-4)


def test_a_nan_is_seen_and_stays_in_its_row() -> None:
    model, cache = VARIANTS["qwen3"](), SlotCache(3, LENGTH, CPU)
    step = NativeStep(model, cache)
    tokens, positions = torch.tensor([4, 5, 6]), torch.tensor([2, 3, 70])
    expected = step(tokens, positions, 71)
    for broken in (torch.nan, torch.inf):
        cache.buffers(0)[1][1, 0, 1] = broken
        logits = step(tokens, positions, 71)
        assert logits[1].isnan().all()
        torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)


def test_scores_of_any_size_are_weighed() -> None:
    """Their exponentials alone would overflow, or all vanish."""
    model = VARIANTS["llama-biases"]()
    for size in (1e3, -1e3):
        logits = []
        for way in (NativeStep, PlainStep):
            cache = SlotCache(1, LENGTH, CPU)
            cache.reserve(2, 2, 8, torch.float32)
            cache.buffers(0)[0].normal_(generator=torch.Generator().manual_seed(2)).abs_().mul_(size)
            cache.buffers(0)[1].normal_(generator=torch.Generator().manual_seed(3))
            with torch.inference_mode():
                logits.append(way(model, cache)(torch.tensor([4]), torch.tensor([70]), 71))
        torch.testing.assert_close(*logits, rtol=0, atol=1e-2)


@pytest.mark.parametrize("token, position", [(-1, 0), (VOCABULARY + 7, 0), (0, -1), (0, LENGTH)])
def test_what_does_not_exist_is_an_error_and_nothing_is_written(token: int, position: int) -> None:
    cache = SlotCache(2, LENGTH, CPU)
    step = NativeStep(VARIANTS["llama"](), cache)
    step(torch.tensor([0, VOCABULARY + 6]), torch.tensor([0, LENGTH - 1]), LENGTH)  # the last that exist
    before = [buffer.clone() for buffer in cache.buffers(0)]
    with pytest.raises(IndexError, match="row 1"):
        step(torch.tensor([3, token]), torch.tensor([1, position]), 2)
    assert all(map(torch.equal, cache.buffers(0), before))
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(AssertionError):
            step(bad, torch.zeros(bad.shape, dtype=torch.int64), 1)


WRONG: dict[str, Callable[[SlotPlan, torch.Tensor], None]] = {
    "a token of no word": lambda plan, tokens: tokens.__setitem__(2, VOCABULARY + 7),
    "a position behind the end": lambda plan, tokens: plan.write_positions.__setitem__(2, LENGTH),
    "a slot that is not there": lambda plan, tokens: plan.write_slots.__setitem__(2, 3),
    "a run behind the last token": lambda plan, tokens: plan.runs[1, 1].add_(1),
    "a run behind the last key": lambda plan, tokens: plan.runs[1, 3].fill_(LENGTH),
    "a run of another slot": lambda plan, tokens: plan.runs[1, 2].fill_(3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_plan_that_does_not_fit_writes_nothing(wrong: str) -> None:
    cache = SlotCache(3, LENGTH, CPU)
    forward, tokens = NativeForward(VARIANTS["llama"](), cache), torch.arange(5)
    plan, positions = ragged_plan(cache, 1, [0, 4], [2, 3], 0)
    assert forward(tokens, positions, plan, linear, cache=cache).isfinite().all()
    before = [buffer.clone() for buffer in cache.buffers(0)]
    WRONG[wrong](plan, tokens)
    with pytest.raises(IndexError, match="row 2: token"):
        forward(tokens, positions, plan, linear, cache=cache)
    assert all(map(torch.equal, cache.buffers(0), before))
    with pytest.raises(AssertionError, match="one cache"):
        forward(tokens, positions, plan, linear, cache=SlotCache(3, LENGTH, CPU))


def test_many_tokens_are_read_in_tiles_and_threads_change_no_bit_of_what_lies_between() -> None:
    """More tokens than go through the MLP together, and enough for threads to share each pass."""
    model, lengths = build("qwen3", head_dim=64), [700, 1, 333]
    tokens, seen, threads = torch.arange(sum(lengths)) % VOCABULARY, [], torch.get_num_threads()
    for count in (1, 3):
        cache = SlotCache(3, 700, CPU)
        torch.set_num_threads(count)
        try:
            forward = NativeForward(model, cache)
            size = library().katds_forward_floats(ctypes.byref(forward._model), ctypes.c_int64(len(tokens)))
            forward._work = torch.full((size + 10_000,), CANARY)
            torch.set_num_threads(1)  # of the matrix products
            plan, positions = ragged_plan(cache, 0, [0] * 3, lengths, 0)
            seen.append(forward(tokens, positions, plan, linear, cache=cache))
        finally:
            torch.set_num_threads(threads)
        assert (forward._work[size:] == CANARY).all(), "the work space is too small"
    assert torch.equal(*seen)
    twin, cache = exact(model), SlotCache(3, 700, CPU)
    plan, positions = ragged_plan(cache, 0, [0] * 3, lengths, 0)
    right = twin(tokens, positions, plan, linear, cache=cache)
    assert (seen[0] - right).norm() < 1e-5 * right.norm()


def test_denormal_numbers_survive() -> None:
    """A library linked with -ffast-math sets the whole process to flush them."""
    play(VARIANTS["llama"](), NativeStep)
    assert sys.float_info.min / 2 > 0 and (torch.tensor([1e-40]) * 0.5).item() > 0


class Adapter(nn.Linear):
    """Some addition to a layer, as an adapter is."""


def spoilt(spoil: Callable[[FlatCausalLM], object]) -> FlatCausalLM:
    model = VARIANTS["qwen3"]()
    spoil(model)
    return model


def first(model: FlatCausalLM) -> Any:
    return model.model.base_model.layers[0]


def transpose(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.t().contiguous().t()


REFUSED: dict[str, Callable[[], FlatCausalLM]] = {
    "the weights are torch.bfloat16": lambda: VARIANTS["qwen3"]().bfloat16(),
    "the weights are torch.float64": lambda: VARIANTS["qwen3"]().double(),
    "the model is a olmo2": lambda: build("olmo2"),
    "its rotary embedding is 'dynamic'": lambda: build("llama", **rope("dynamic")),
    "its activation is not silu": lambda: build("llama", hidden_act="gelu"),
    "turns 4 of 8 dimensions": lambda: build("llama", **rope("linear", partial_rotary_factor=0.5)),
    "one of its matrices is a Adapter": lambda: spoilt(lambda m: setattr(first(m).mlp, "up_proj", Adapter(32, 48))),
    "are strided torch.float32 on cpu": lambda: spoilt(lambda m: transpose(first(m).self_attn.q_proj)),
    "are contiguous torch.float64 on cpu": lambda: spoilt(lambda m: first(m).input_layernorm.double()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_understand_is_refused(reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        NativeStep(REFUSED[reason](), SlotCache(2, 8, CPU))


def test_without_pytorchs_blas_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    functions.cache_clear()
    try:
        with pytest.raises(Unavailable, match="PyTorch's BLAS cannot be reached"):
            NativeStep(VARIANTS["llama"](), SlotCache(2, 8, CPU))
    finally:
        functions.cache_clear()


def test_another_formula_is_found_out_and_said_once() -> None:
    said: list[str] = []
    model = VARIANTS["qwen3"]()
    mlp = first(model).mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x))
    make = StepMaker(True, False, said.append)
    steps = [make(model, 2, 8, CPU).step for _ in range(2)]
    assert all(isinstance(step, PlainStep) for step in steps)
    assert len(said) == 1 and "logits differ from the model's own" in said[0]


def test_a_sound_model_is_taken_without_a_word() -> None:
    said: list[str] = []
    for name in VARIANTS:
        step = StepMaker(True, False, said.append)(VARIANTS[name](), 2, 8, CPU).step
        assert isinstance(step, NativeStep), (name, said)
    assert not said


def test_a_teacher_is_read_in_c_where_that_is_right_and_as_it_is_elsewhere() -> None:
    said: list[str] = []
    cache = SlotCache(2, 8, CPU)
    make = ForwardMaker(True, said.append)
    assert isinstance(make(VARIANTS["qwen3"](), cache), NativeForward) and not said
    engine = torch.nn.Linear(1, 1)  # whatever gathers its weights itself
    assert make(engine, cache) is engine and not said
    model = VARIANTS["qwen3"]()
    assert ForwardMaker(False, said.append)(model, cache) is model and not said
    wrong = VARIANTS["qwen3"]()
    attention = first(wrong).self_attn
    attention.q_norm.forward = lambda x: x
    make = ForwardMaker(True, said.append)
    assert make(wrong, cache) is wrong and make(wrong, cache) is wrong
    assert len(said) == 1 and said[0].startswith("the teacher reads through transformers")
