"""What `bench gpu` measures: for each part a generator of (case, function that measures it).

The model of a part is made when its first case is asked for, and is gone when the part is done.
"""

from __future__ import annotations

import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from katds.bench.ranks import on_ranks
from katds.bench.timing import alternate
from katds.bench.workloads import WORKLOADS, build
from katds.core.divergences import reverse_kl
from katds.core.objectives.reverse_kl import ReverseKl
from katds.core.types import Field, Need, Prompt, RolloutRequest
from katds.models.attention import NAME, PackedPlan, is_flash
from katds.models.causal import FlatCausalLM
from katds.models.graph_step import GraphStep, StaticStep
from katds.models.slot_cache import SlotCache
from katds.models.step import PlainStep
from katds.models.tiled_head import head_logprobs, tiled_loss
from katds.rollout.decode import Chunk
from katds.rollout.sampling import Sampling, sample_step
from katds.rollout.scorer import TeacherScorer
from katds.rollout.slots import Seat

Case = tuple[str, Callable[[], dict[str, Any]]]
GIB = 2**30
# Dense bf16 FLOP/s and bytes/s of the data sheets (SXM where there is a choice).
SHEET = {
    "B200": (2250e12, 7.7e12), "GB200": (2500e12, 8.0e12), "H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "H20": (148e12, 4.0e12),
    "A100": (312e12, 2.0e12), "L40S": (362e12, 0.86e12), "A10": (125e12, 0.6e12), "4090": (165e12, 1.0e12),
}  # fmt: skip
TOP_K = 64


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int = 151936
    tied: bool = True

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.dim, tie_word_embeddings=self.tied,
            max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6,
        )  # fmt: skip


SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128),
    "8B": Shape(4096, 12288, 36, 32, 8, 128, tied=False),
}
TOY = {"toy student": Shape(64, 128, 2, 4, 2, 32, 512), "toy teacher": Shape(96, 192, 2, 4, 2, 32, 512, tied=False)}


@dataclass
class Bench:
    """The device, its limits as measured, and the sizes of this run."""

    device: torch.device
    toy: bool
    context: int
    repetitions: int
    product: int  # side of the matrices whose product is the limit
    copy_bytes: int
    bandwidth: float = 0.0  # bytes/s, read and written
    peak: float = 0.0  # FLOP/s
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls, toy: bool, context: int, repetitions: int) -> Bench:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        if not cuda:
            torch.set_num_threads(1)  # what is this small only waits for a second one
        if toy:
            context, repetitions = min(context, 32), 1
        bench = cls(device, toy, context, repetitions, 256 if toy else 8192, (1 << 22) if toy else (1 << 31))
        bench._measure_limits()
        return bench

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def sheet(self) -> tuple[float, float] | None:
        """FLOP/s and bytes/s of the data sheet, if it is known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return max(((key, value) for key, value in SHEET.items() if key in name), default=(None, None), key=_length)[1]

    def limits(self) -> dict[str, Any]:
        sheet = self.sheet or (None, None)
        return {
            "device": str(self.device), "dtype": str(self.dtype), "copy_bytes_per_second": self.bandwidth,
            "product_flops": self.peak, "sheet_flops": sheet[0], "sheet_bytes_per_second": sheet[1],
            "shapes": {name: vars(shape) for name, shape in (TOY if self.toy else SHAPES).items()},
        }  # fmt: skip

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a device that an earlier case has broken; the next one will say so
                torch.cuda.empty_cache()

    def race(self, contenders: Mapping[str, Callable[[], Any]], inner: int = 1) -> dict[str, float]:
        """Median seconds of each contender / `inner`, in turn."""
        taken = alternate(contenders, self.repetitions, 1 if self.toy else 2, self.settle)
        return {name: statistics.median(seconds) / inner for name, seconds in taken.items()}

    def seconds(self, run: Callable[[], Any], inner: int = 1) -> float:
        return self.race({"": run}, inner)[""]

    def peak_gib(self, run: Callable[[], Any]) -> float | None:
        """Memory that one call takes beyond what lies there already."""
        if self.device.type != "cuda":
            return None
        self.tidy()
        self.settle()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.settle()
        return (torch.cuda.max_memory_allocated() - before) / GIB

    def held_gib(self) -> float:
        return torch.cuda.memory_allocated() / GIB if self.device.type == "cuda" else 0.0

    def use(self, flops: float, seconds: float) -> dict[str, float | None]:
        """Model FLOPs utilisation."""
        return {
            "MFU": flops / seconds / self.peak,
            "MFU (sheet)": flops / seconds / self.sheet[0] if self.sheet else None,
        }

    def model(self, shape: Shape) -> FlatCausalLM:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(shape.config(), attn_implementation=NAME, dtype=self.dtype)
        return FlatCausalLM(model.eval(), shape.vocabulary)

    def tokens(self, *size: int, below: int) -> torch.Tensor:
        return torch.randint(below, size, device=self.device)

    def _measure_limits(self) -> None:
        source = torch.zeros(self.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * self.copy_bytes / self.seconds(lambda: target.copy_(source))
        a, b = torch.randn(2, self.product, self.product, device=self.device).to(self.dtype)
        self.peak = 2 * self.product**3 / self.seconds(lambda: a @ b)


def _length(entry: tuple[Any, Any]) -> int:
    return len(entry[0] or "")


def students(bench: Bench) -> dict[str, Shape]:
    return {"toy student": TOY["toy student"]} if bench.toy else {name: SHAPES[name] for name in ("0.6B", "1.7B")}


def teacher_shape(bench: Bench) -> tuple[str, Shape]:
    name = "toy teacher" if bench.toy else "8B"
    return name, (TOY if bench.toy else SHAPES)[name]


def multiplied(model: FlatCausalLM) -> int:
    """Weights that every token is multiplied with; the embedding only where it is the head."""
    layers = sum(m.weight.numel() for m in model.model.base_model.modules() if isinstance(m, torch.nn.Linear))
    return layers + model.head_parameters()[0].numel()


# (a) Decoding.


def decode(bench: Bench) -> Iterator[Case]:
    for name, shape in students(bench).items():
        model = bench.model(shape)
        for batch in (3,) if bench.toy else (1, 16, 64, 256):
            yield from _decode_cases(bench, f"{name}, batch {batch}", model, shape, batch)
        del model


def _decode_cases(bench: Bench, name: str, model: FlatCausalLM, shape: Shape, batch: int) -> Iterator[Case]:
    """Contenders in one race; a row each. `static eager` is what the graph replays, launched operator by operator."""
    steps = 2 if bench.toy else 16
    ways: dict[str, Any] = {"eager": PlainStep, "static eager": StaticStep}
    if bench.device.type == "cuda":
        ways["graph"] = GraphStep
    fastest = list(ways)[-1]
    seconds: dict[str, float] = {}
    failed: dict[str, Exception] = {}

    def race() -> None:
        cache = SlotCache(batch, bench.context + steps + 1, bench.device)
        contenders = {}
        with torch.inference_mode():
            for title in titles:
                way, _, sampled = title.partition(" + ")
                sampling = Sampling(top_p=0.95) if sampled else None
                try:
                    run = partial(_burst, bench, ways[way](model, cache), shape, batch, steps, sampling)
                    run()
                    contenders[title] = run
                except Exception as error:
                    failed[title] = error
            seconds.update(bench.race(contenders, steps))

    weights = multiplied(model) * bench.dtype.itemsize
    keys = 2 * batch * bench.context * shape.layers * shape.kv_heads * shape.dim * bench.dtype.itemsize
    floor = (weights + keys) / bench.bandwidth

    def row(title: str) -> dict[str, Any]:
        if not seconds:
            race()
        if title in failed:
            raise failed[title]
        s = seconds[title]
        return {"ms": 1e3 * s, "tokens/s": batch / s, "x floor": s / floor, "floor ms": 1e3 * floor}

    titles = [*ways, f"{fastest} + sampling"]
    for title in titles:
        yield f"{name}, {title}", partial(row, title)


def _burst(bench: Bench, step: Any, shape: Shape, batch: int, steps: int, sampling: Sampling | None) -> None:
    tokens = torch.zeros(batch, dtype=torch.int64, device=bench.device)
    positions = torch.full((batch,), bench.context, device=bench.device)
    u = torch.full((batch,), 0.5, dtype=torch.float64, device=bench.device)
    for i in range(steps):
        logits = step(tokens, positions, bench.context + i + 1)
        if sampling is not None:
            tokens = sample_step(logits, u, sampling, min(TOP_K, shape.vocabulary)).tokens_S
        positions = positions + 1


# (b) The teacher reads along.


def teacher(bench: Bench) -> Iterator[Case]:
    name, shape = teacher_shape(bench)
    model = bench.model(shape)
    for chunk in (8,) if bench.toy else (32, 64, 128, 256):
        for slots in (2,) if bench.toy else (16, 64):
            yield f"{name}, {slots} slots x {chunk} tokens", partial(_score, bench, model, shape, slots, chunk)


def _score(bench: Bench, model: FlatCausalLM, shape: Shape, slots: int, chunk: int) -> dict[str, Any]:
    """`TeacherScorer.score`, as a round of the engine calls it: forward, head in tiles, divergence on the student's top K."""
    top_k = min(TOP_K, shape.vocabulary)
    cache = SlotCache(slots, bench.context + chunk + 1, bench.device)
    prompt = tuple(range(bench.context + 1))
    seats = [
        Seat(RolloutRequest(i, Prompt(i, tuple(t % shape.vocabulary for t in prompt)), chunk), 0, fresh=False)
        for i in range(slots)
    ]
    logprobs = torch.randn(slots, chunk, top_k, device=bench.device).log_softmax(-1)
    made = Chunk(
        bench.tokens(slots, chunk, below=shape.vocabulary), bench.tokens(slots, chunk, below=shape.vocabulary),
        bench.tokens(slots, chunk, top_k, below=shape.vocabulary), logprobs,
    )  # fmt: skip
    scorer = TeacherScorer(model, cache, frozenset({Need.SAMPLED, Need.STUDENT_TOP_K}), True, top_k, 1.0)
    held = bench.held_gib()
    peak = bench.peak_gib(lambda: scorer.score(seats, {}, made))
    s = bench.seconds(lambda: scorer.score(seats, {}, made))
    tokens = slots * chunk
    memory = None if peak is None else held + peak
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(2 * multiplied(model) * tokens, s), "GiB": memory}


# (c) Training.


def train(bench: Bench) -> Iterator[Case]:
    for name, shape in students(bench).items():
        model = bench.model(shape)
        model.train()
        for recompute in (False, True):  # in this order: it is not switched off again
            title = f"{name}, {'recomputed' if recompute else 'kept'} activations"
            yield title, partial(_train, bench, model, shape, recompute)
        del model


def _train(bench: Bench, model: FlatCausalLM, shape: Shape, recompute: bool) -> dict[str, Any]:
    tokens, lengths = (64, [24, 40]) if bench.toy else (16384, [512, 1024, 2048, 512, 4096, 1024, 3072, 4096])
    assert sum(lengths) == tokens
    if recompute:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = bench.tokens(tokens, below=shape.vocabulary)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(bench.device)
    tile = _student_top_k(bench, shape, tokens)

    def step() -> None:
        plan = PackedPlan.of(lengths, bench.device)

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
            return tiled_loss(hidden, weight, bias, 1.0, tile)[0]

        (model(ids, positions, plan, head) / tokens).backward()
        model.zero_grad(set_to_none=True)

    held = bench.held_gib()
    peak = bench.peak_gib(step)
    s = bench.seconds(step)
    memory = None if peak is None else held + peak
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(6 * multiplied(model) * tokens, s), "GiB": memory}


def _student_top_k(bench: Bench, shape: Shape, tokens: int) -> Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]:
    """The default objective on made-up teacher scores."""
    top_k = min(TOP_K, shape.vocabulary - 1)
    ids = torch.arange(top_k, device=bench.device).expand(tokens, -1).int()
    scores = (torch.randn(tokens, top_k, device=bench.device)).log_softmax(-1) - 0.1
    actions = torch.zeros(tokens, dtype=torch.int64, device=bench.device)
    objective = ReverseKl("student_top_k")

    def tile(logprobs: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
        signal = {Field.STUDENT_TOP_IDS: ids[at], Field.STUDENT_TOP: scores[at]}
        return objective.tile(logprobs, actions[at], signal)

    return tile


# (d) The loss by itself.


def loss(bench: Bench) -> Iterator[Case]:
    shape = next(iter(students(bench).values()))
    _, guide = teacher_shape(bench)
    tokens = 48 if bench.toy else 8192
    for name in ("top K, tiles", "full, tiles", "full, whole logits"):
        yield f"{tokens} tokens x {shape.vocabulary}, {name}", partial(_loss, bench, shape, guide, tokens, name)


def _loss(bench: Bench, shape: Shape, guide: Shape, tokens: int, name: str) -> dict[str, Any]:
    """Forward and backward from hidden states; `whole logits` is what one writes without tiles."""

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, device=bench.device) / size[-1] ** 0.5).to(bench.dtype)

    hidden, weight = (random(n, shape.hidden).requires_grad_() for n in (tokens, shape.vocabulary))
    teacher_hidden, teacher_weight = (random(n, guide.hidden) for n in (tokens, guide.vocabulary))
    objective, actions = ReverseKl("full"), torch.zeros(tokens, dtype=torch.int64, device=bench.device)

    def full(logprobs: torch.Tensor, at: slice) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            scores = head_logprobs(teacher_hidden[at], teacher_weight, None, 1.0)
        return objective.tile(logprobs, actions[at], {Field.TEACHER_LOGPROBS: scores})

    def whole() -> torch.Tensor:
        with torch.no_grad():
            scores = head_logprobs(teacher_hidden, teacher_weight, None, 1.0)
        return reverse_kl(head_logprobs(hidden, weight, None, 1.0), scores).sum()

    tile = _student_top_k(bench, shape, tokens) if name == "top K, tiles" else full

    def step() -> None:
        value = whole() if name == "full, whole logits" else tiled_loss(hidden, weight, None, 1.0, tile)[0]
        (value / tokens).backward()
        hidden.grad = weight.grad = None

    peak = bench.peak_gib(step)
    s = bench.seconds(step)
    flops = 6 * tokens * shape.vocabulary * shape.hidden
    flops += 0 if name == "top K, tiles" else 2 * tokens * guide.vocabulary * guide.hidden
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(flops, s), "GiB": peak}


# (e) Attention kernels.


def attention(bench: Bench) -> Iterator[Case]:
    shape = next(reversed(students(bench).values()))
    for length in (16,) if bench.toy else (512, 2048, 8192):
        for name, kernel in _kernels(bench).items():
            yield f"16k tokens of {length}, {name}", partial(_attention, bench, shape, kernel, length)


def _kernels(bench: Bench) -> dict[str, Callable[..., Any]]:
    """Causal attention (q, k, v, bounds, longest) over packed sequences."""
    if not is_flash(torch.empty(0, dtype=bench.dtype, device=bench.device)):
        return {"sdpa": _sdpa}
    from torch.nn.attention.varlen import varlen_attn

    kernels: dict[str, Callable[..., Any]] = {
        "torch varlen": lambda q, k, v, bounds, n: varlen_attn(
            q, k, v, bounds, bounds, n, n, window_size=(-1, 0), enable_gqa=True
        )
    }
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        kernels["flash-attn"] = lambda q, k, v, bounds, n: flash_attn_varlen_func(
            q, k, v, bounds, bounds, n, n, causal=True
        )
    return kernels


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _attention(bench: Bench, shape: Shape, kernel: Callable[..., Any], length: int) -> dict[str, Any]:
    tokens = 64 if bench.toy else 16384
    q, k, v = (
        torch.randn(tokens, heads, shape.dim, device=bench.device).to(bench.dtype).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=bench.device)

    def step() -> None:
        kernel(q, k, v, bounds, length).sum().backward()
        q.grad = k.grad = v.grad = None

    s = bench.seconds(step)
    flops = 3.5 * 4 * tokens * length / 2 * shape.heads * shape.dim  # the backward pass recomputes the scores
    return {"ms": 1e3 * s, "tokens/s": tokens / s, **bench.use(flops, s)}


# (f) Whole steps, under ZeRO-3 on one rank.


def step(bench: Bench) -> Iterator[Case]:
    for weights in ("copy",) if bench.toy else ("view", "copy"):
        for fast in (True,) if bench.toy else (True, False):
            title = f"{'smoke' if bench.toy else 'small'} models, {weights}{', fast decode' if fast else ''}"
            yield title, partial(_whole, bench, weights, fast)


def _whole(bench: Bench, weights: str, fast: bool) -> dict[str, Any]:
    arguments = ("smoke" if bench.toy else "small", weights, fast, 1 if bench.toy else 4, str(bench.dtype))
    if bench.toy and bench.device.type == "cpu":
        return whole_steps(*arguments)  # a process of its own takes longer than the rest of the toy run
    row: dict[str, Any] = on_ranks(1, whole_steps, *arguments)[0]
    return row


def whole_steps(shape: str, weights: str, fast: bool, steps: int, dtype: str) -> dict[str, Any]:
    """Collective: training steps through `katds.run`, after one that is not counted; and the collectives' self-test."""
    from katds.config import Recipe
    from katds.parallel.world import start_world
    from katds.run import open_run

    workload, world = WORKLOADS[shape], start_world()
    device = world.device
    rows = torch.arange(6.0, device=device).view(3, 2)
    back = world.collective.exchange(rows, [3] * world.size, [3] * world.size)  # NCCL on a GPU
    assert torch.equal(back, rows), f"exchange gave {back.tolist()}"
    assert world.collective.sum(torch.ones(2)).tolist() == [world.size] * 2 and world.collective.gather(world.rank) == [
        0
    ]
    zero3 = Path(__file__).parents[2] / "ds_configs" / f"zero3_{'bf16' if dtype == 'torch.bfloat16' else 'fp32'}.json"
    said = io.StringIO()  # standard output is for the table
    with tempfile.TemporaryDirectory() as name, redirect_stdout(said):
        folder = build(workload, Path(name), workload.rollouts * (steps + 1))
        run = open_run(
            Recipe.model_validate({
                "run": {"name": "step", "folder": str(folder / "runs"), "rollout_samples": 0},
                "student": {"path": str(folder / "student"), "deepspeed": str(zero3)},
                "teacher": {"path": str(folder / "teacher"), "deepspeed": str(zero3), "gather": "phase"},
                "data": {"train": str(folder / "prompts.jsonl"), "chat_template": False, "answer_column": None},
                "rollout": {
                    "prompts_per_step": workload.rollouts, "max_new_tokens": workload.new_tokens,
                    "slots": workload.rollouts, "chunk_tokens": 32, "weights": weights, "fast_decode": fast,
                },
                "stop": {"kind": "never"},
                "train": {"steps": steps + 1, "micro_batch_tokens": 8192},
            })
        )  # fmt: skip
        seconds = []
        for number in range(steps + 1):
            world.collective.barrier()
            start = time.perf_counter()
            run.trainer.step(number)
            world.collective.barrier()
            seconds.append(time.perf_counter() - start)
        run.monitor.close()
    taken = statistics.median(seconds[1:])
    memory = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    given_up = [line for line in said.getvalue().splitlines() if "operator by operator" in line]
    if given_up:
        raise RuntimeError(given_up[0])  # graphs, or C code, that do not come about are a failure here
    return {"ms": 1e3 * taken, "tokens/s": run.trainer.engine.stats.tokens / taken, "GiB": memory}


CASES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "decode": decode, "teacher": teacher, "train": train, "loss": loss, "attention": attention, "step": step,
}  # fmt: skip
