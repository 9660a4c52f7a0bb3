"""What attention takes of a phase: katds's own, PyTorch's over the same keys, the reading of these keys, and what attention and matrix
products cost each other.

Every layer has keys and values of its own, in caches as large as those of the phase. With one layer's keys for all, they would still be
in the processor's cache when the next layer asks for them, which in a step they may not be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from katds.bench.floors import Products, median_seconds, recorded

if TYPE_CHECKING:
    import torch

    Outputs = list[torch.Tensor]
    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

PROBES = 16  # forwards of a phase that are timed, at most


@dataclass(frozen=True)
class Forward:
    """`count` forwards in which the last `queries` of the `keys` tokens of each of the slots 0 .. rows-1 are computed."""

    rows: int
    queries: int
    keys: int
    count: int = 1


def live_rows(decode_steps: Mapping[int, int]) -> list[int]:
    """Of every token step, from `EngineStats.decode_steps`, where all rollouts have begun together: rows only become fewer."""
    return [rows for rows in sorted(decode_steps, reverse=True) for _ in range(decode_steps[rows])]


def decode_forwards(live: Sequence[int], prompt: int, chunk: int) -> list[Forward]:
    """Chunk by chunk, with the keys that are seen on average. `prompt`: tokens of every prompt."""
    return [Forward(live[at], 1, prompt + at + chunk // 2, chunk) for at in range(0, len(live), chunk)]


def teacher_forwards(live: Sequence[int], prompt: int, chunk: int) -> list[Forward]:
    """One per chunk, which ends with the last token but one. The first reads the prompts as well."""
    ends = {at: prompt - 1 + at + chunk for at in range(0, len(live), chunk)}
    return [Forward(live[at], chunk if at else end, end) for at, end in ends.items()]


def learned_lengths(live: Sequence[int], prompt: int, chunk: int, longest: int) -> list[int]:
    """Tokens of each packed sequence. That a rollout ended early is known to the chunk: it is taken to have ended in the middle."""
    steps = [sum(rows > slot for rows in live) for slot in range(max(live))]
    return [prompt - 1 + (longest if count >= longest else count - chunk // 2) for count in steps]


def total(forwards: Sequence[Forward], seconds: Callable[[Forward], float]) -> float:
    """Seconds of all forwards, of which only some are timed; they stand for their neighbours."""
    stride = -(-len(forwards) // PROBES)
    groups = [forwards[at : at + stride] for at in range(0, len(forwards), stride)]
    return sum(seconds(group[len(group) // 2]) * sum(forward.count for forward in group) for group in groups)


class SlotAttention:
    """The attention of all layers of a model over the slots of one rollout phase.

    Args:
        config: of transformers.
        slots, length: of the phase's cache.

    Memory: that of a `SlotCache`.
    """

    def __init__(self, config: Any, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        from katds.models.slot_cache import SlotCache

        self._config, self._dtype, self._device = config, dtype, device
        self._layers = range(config.num_hidden_layers)
        self.cache = SlotCache(slots, length, device)
        self.cache.reserve(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype)
        for buffer in self._buffers():
            buffer.normal_()  # memory that was never written to would be one page of zeros

    def katds(self, forward: Forward) -> float:
        """Seconds of one such forward. A single query per slot is computed as a decode step does it; on CUDA recorded, too."""
        layers = self.attend(forward, self.query(forward))
        return self._seconds(lambda: [layer() for layer in layers], forward)

    def sdpa(self, forward: Forward) -> float:
        """Seconds of one such forward."""
        return self._seconds(self.attend_pytorch(forward, self.query(forward)), forward)

    def displaced(self, products: Products, forward: Forward) -> float:
        """Seconds that attention and the matrix products of such a forward take more in turn, layer by layer as in a model, than each by
        itself: weights and keys displace each other from the processor's caches."""
        rows = forward.rows * forward.queries
        layers, multiply = self.attend(forward, self.query(forward)), products.layers(rows, len(self._layers))

        def in_turn() -> Outputs:
            outs = []
            for product, layer in zip(multiply[:-1], layers, strict=True):
                product()
                outs.append(layer())
            multiply[-1]()
            return outs

        return self._seconds(in_turn, forward) - self.katds(forward) - products.multiply(rows)

    def bytes(self, forwards: Sequence[Forward]) -> int:
        """Of the keys and values of these forwards, each read once a forward."""
        config = self._config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self._dtype.itemsize
        return sum(forward.count * forward.rows * forward.keys for forward in forwards) * token

    def bandwidth(self) -> float:
        """Bytes/s at which this rank's processor reads the whole cache, again and again."""
        import torch

        buffers = [buffer.view(torch.float32) for buffer in self._buffers()]
        size = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
        return size / median_seconds(lambda: [buffer.sum() for buffer in buffers], self._device)

    def query(self, forward: Forward) -> torch.Tensor:
        """Random [rows, queries, Hq, D], for all layers the same."""
        import torch

        heads, dim = self._config.num_attention_heads, self._config.head_dim
        return torch.randn(forward.rows, forward.queries, heads, dim, dtype=self._dtype, device=self._device)

    def attend(self, forward: Forward, query: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Of each layer a call of the function that models of katds call, which returns [1, rows x queries, Hq, D]."""
        import torch

        from katds.models.attention import attend
        from katds.models.slot_cache import ragged_plan, uniform_plan

        rows, queries, keys = forward.rows, forward.queries, forward.keys
        if queries == 1:
            slots = torch.arange(rows, device=self._device)
            plan = uniform_plan(self.cache, slots, torch.full_like(slots, keys - 1), keys)
        else:
            plan, _ = ragged_plan(self.cache, 0, [keys - queries] * rows, [queries] * rows, rows)
        flat, module = query.flatten(0, 1).transpose(0, 1).unsqueeze(0), torch.nn.Identity()
        scaling = self._config.head_dim**-0.5

        def attention(layer: int) -> torch.Tensor:
            return attend(module, flat, *self.cache.buffers(layer), None, scaling, plan=plan)[0]

        return [partial(attention, layer) for layer in self._layers]

    def attend_pytorch(self, forward: Forward, query: torch.Tensor) -> Callable[[], Outputs]:
        """scaled_dot_product_attention; of each layer [rows, Hq, queries, D]."""
        import torch

        queries, keys = forward.queries, forward.keys
        q, causal, mask = query.transpose(1, 2), 1 < queries == keys, None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self._device).tril(keys - queries)
        parts = [[self._seen(buffer, forward) for buffer in self.cache.buffers(layer)] for layer in self._layers]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: [sdpa(q, k, v, mask, is_causal=causal, enable_gqa=True) for k, v in parts]

    def _seen(self, buffer: torch.Tensor, forward: Forward) -> torch.Tensor:
        """[rows, Hkv, keys, D] of a layer's buffer, in whichever layout."""
        from katds.models.attention import is_flash

        return (buffer.transpose(1, 2) if is_flash(buffer) else buffer)[: forward.rows, :, : forward.keys]

    def _seconds(self, run: Callable[[], Outputs], forward: Forward) -> float:
        import torch

        is_recorded = forward.queries == 1 and self._device.type == "cuda"  # as decode steps are, and nothing else
        with torch.inference_mode():
            return median_seconds(recorded(run) if is_recorded else run, self._device)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._layers for buffer in self.cache.buffers(layer)]


def learn_katds(config: Any, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Outputs]:
    """katds's attention over sequences of these lengths, packed: forward and backward of all layers; gradients of the first layer."""
    import torch

    from katds.models.attention import attend
    from katds.models.plans import PackedPlan

    plan, module, scaling = PackedPlan.of(lengths, device), torch.nn.Identity(), config.head_dim**-0.5

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return attend(module, q, k, v, None, scaling, plan=plan)[0]

    return _learn(attention, [_qkv(config, (1, sum(lengths)), dtype, device) for _ in range(config.num_hidden_layers)])


def learn_sdpa(config: Any, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Outputs]:
    """The same with PyTorch's, in a batch for each length; gradients batch after batch."""
    import torch

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    batches = [
        _learn(attention, [_qkv(config, (count, length), dtype, device) for _ in range(config.num_hidden_layers)])
        for length, count in Counter(lengths).items()
    ]
    return lambda: [gradient for batch in batches for gradient in batch()]


def _qkv(config: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Random [sequences, tokens, heads, D] that want gradients."""
    import torch

    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [torch.randn(*shape, h, config.head_dim, dtype=dtype, device=device, requires_grad=True) for h in heads]


def _learn(attention: Attention, layers: list[list[torch.Tensor]]) -> Callable[[], Outputs]:
    """Forward through all layers, then backward in the other direction, as in a model."""
    import torch

    weight = torch.ones_like(layers[0][0])

    def run() -> Outputs:
        gradients: Outputs = []
        outs = [attention(*qkv) for qkv in layers]
        for qkv in reversed(layers):
            gradients = list(torch.autograd.grad(outs.pop(), qkv, weight))
        return gradients

    return run
