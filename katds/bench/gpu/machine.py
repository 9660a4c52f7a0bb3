"""One GPU, what it can do at most as measured here, and the models that are put on it."""

from __future__ import annotations

import gc
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from katds.bench.floors import copy_bandwidth
from katds.bench.report import versions
from katds.bench.timing import alternate
from katds.models.attention import NAME
from katds.models.causal import FlatCausalLM

Case = tuple[str, Callable[[], dict[str, Any]]]
GIB = 2**30
# Dense bf16 FLOP/s and bytes/s of the data sheets (SXM where there is a choice).
SHEET = {
    "B200": (2250e12, 7.7e12), "GB200": (2500e12, 8.0e12), "H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "H20": (148e12, 4.0e12),
    "A100": (312e12, 2.0e12), "L40S": (362e12, 0.86e12), "A10": (125e12, 0.6e12), "4090": (165e12, 1.0e12),
}  # fmt: skip
TOP_K = 64  # of the student's tokens, as by default
# What katds passes to torch's attention kernel by name.
VARLEN = ("scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")


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
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    @property
    def sheet(self) -> tuple[float, float] | None:
        """FLOP/s and bytes/s of the data sheet, if it is known."""
        return max(
            ((key, value) for key, value in SHEET.items() if key in self.name), default=(None, None), key=_length
        )[1]

    def limits(self) -> dict[str, Any]:
        sheet = self.sheet or (None, None)
        return {
            "device": str(self.device), "device_name": self.name, "dtype": str(self.dtype), "copy_bytes_per_second": self.bandwidth,
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

    def race(self, contenders: Mapping[str, Callable[[], Any]], inner: int = 1) -> dict[str, list[float]]:
        """Seconds of each contender / `inner`, in turn; all repetitions."""
        taken = alternate(contenders, self.repetitions, 1 if self.toy else 2, self.settle)
        return {name: [s / inner for s in seconds] for name, seconds in taken.items()}

    def timed(self, run: Callable[[], Any], tokens: int, flops: float) -> dict[str, Any]:
        """Columns of a case that takes `flops` for its tokens."""
        seconds = self.race({"": run})[""]
        return columns(seconds, tokens) | self.use(flops, statistics.median(seconds))

    def peak_gib(self, run: Callable[[], Any]) -> float | None:
        """Memory that one call takes beyond what lies there already; None on a CPU, which does not count it."""
        if self.device.type != "cuda":
            run()
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

    def whole_gib(self, run: Callable[[], Any]) -> float | None:
        """Memory at the peak of one call, with what lay there before."""
        held, peak = self.held_gib(), self.peak_gib(run)
        return None if peak is None else held + peak

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
        self.bandwidth = copy_bandwidth(self.device, self.copy_bytes)
        a, b = torch.randn(2, self.product, self.product, device=self.device).to(self.dtype)
        self.peak = 2 * self.product**3 / statistics.median(self.race({"": lambda: a @ b})[""])


def columns(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """Of repetitions that take `tokens` tokens each; `seconds`, all of them, are for the JSON file."""
    median = statistics.median(seconds)
    return {"ms": 1e3 * median, "tokens/s": tokens / median, "seconds": list(seconds)}


def software() -> list[str]:
    """What an unknown machine has of that which the kernels need, line by line."""
    lines = [", ".join(f"{name} {number}" for name, number in versions().items()) + f", CUDA {torch.version.cuda}"]
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return [*lines, f"varlen_attn is missing ({error}); katds needs it on a GPU"]
    signature = inspect.signature(varlen_attn)
    lacking = [name for name in VARLEN if name not in signature.parameters]
    return [*lines, f"varlen_attn{signature}", *([f"varlen_attn lacks {', '.join(lacking)}"] if lacking else [])]


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
