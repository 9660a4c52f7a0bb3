"""The forward of a Llama-like model in C (float32, CPU): what it asks of a model, and the calls.

PyTorch spends some forty operator calls per layer, and each takes its results through the memory. In a decode step of a few million
parameters they cost several times the arithmetic, in a teacher's chunk a third of it. Here a forward is one call; the matrix
products are those of PyTorch's own BLAS.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from katds.models.causal import FlatCausalLM, linear
from katds.models.native.attention import run_table
from katds.models.native.build import Unavailable, functions, library
from katds.models.plans import SlotPlan
from katds.models.slot_cache import SlotCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on nothing but the position

_NORMS = ("input_norm", "post_norm", "query_norm", "key_norm")
_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, ctypes.c_void_p) for name in _MATRICES),
        *((f"{name}_bias", ctypes.c_void_p) for name in _MATRICES),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in ("sgemm", "parallel", "product_threads", "embedding", "norm", "cosine", "sine")
        ),
        *((n, ctypes.c_int64) for n in ("layers", "hidden", "heads", "kv_heads", "dim", "inner", "tokens")),
        *((n, ctypes.c_int64) for n in ("slots", "length", "threads")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in ("tokens", "positions", "write_source", "write_slots", "write_positions", "runs", "work")
        ),
        *((n, ctypes.c_int64) for n in ("n", "writes", "count")),
    ]


class NativeForward:
    """`FlatCausalLM.forward` over one cache.

    Args:
        model: with its weights in place; they must stay where they are as long as this is used.

    Memory: activations of one layer for the most tokens so far, some of them for 256 tokens at a time, and the rotation angles of
    every position.

    Raises:
        Unavailable: this model, device, type or machine is not one for it.

    Not for two threads at once: they would share the work space.
    """

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        _check(model, cache)
        code = library()
        self._forward, self._floats = code.katds_forward, code.katds_forward_floats
        self._forward.restype = self._floats.restype = ctypes.c_int64
        self._keep: list[torch.Tensor] = []  # whatever C points to
        config, base = model.model.config, model.model.base_model
        first = base.layers[0].self_attn
        positions = torch.arange(cache.length)[None]
        cosine, sine = (table[0].contiguous() for table in base.rotary_emb(torch.zeros(1), positions))
        self._cache, self.head, self._hidden = cache, model.head_parameters(), config.hidden_size
        for tensor in self.head:
            self._at(tensor)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        if cosine.shape[1] != dim:
            raise Unavailable(f"its rotary embedding turns {cosine.shape[1]} of {dim} dimensions")
        cache.reserve(len(base.layers), kv_heads, dim, torch.float32)
        layers = [self._layer(layer, config, *cache.buffers(i)) for i, layer in enumerate(base.layers)]
        self._layers = (_Layer * len(layers))(*layers)
        inner = base.layers[0].mlp.gate_proj.out_features
        self._model = _Model(
            *functions(), self._at(base.embed_tokens.weight), self._at(base.norm.weight), self._at(cosine), self._at(sine),
            len(layers), config.hidden_size, heads, kv_heads, dim, inner, base.embed_tokens.weight.shape[0], cache.slots,
            cache.length, torch.get_num_threads(), config.rms_norm_eps, first.scaling,
        )  # fmt: skip
        self._work = torch.empty(0)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: SlotPlan,
        head: Callable[..., Any] | None,
        rows: torch.Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Any:
        """`FlatCausalLM.forward`. `cache` must be the one it was made for.

        Raises IndexError, before anything is written.
        """
        assert cache is self._cache, "a native forward has one cache"
        writes = (plan.write_source, plan.write_slots, plan.write_positions)
        hidden = self.hidden(input_ids, position_ids, writes, plan.runs)
        return None if head is None else head(hidden if rows is None else hidden[rows], *self.head)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        writes: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
        runs: torch.Tensor,
    ) -> torch.Tensor:
        """The last hidden states [N, H] of tokens [N] at positions [N].

        Args:
            writes: source token (None: in order), slot and position [M] of each pair of key and value.
            runs: [R, 4], see `run_table`. All int64.
        """
        for tensor in (tokens, positions, runs, *writes):
            if tensor is not None:
                assert tensor.dtype == torch.int64 and tensor.is_contiguous(), f"{tensor.dtype} {tensor.stride()}"
        count = tokens.shape[0]
        assert positions.shape == tokens.shape and writes[1].shape == writes[2].shape, (
            "one position per token and write"
        )
        floats = self._floats(ctypes.byref(self._model), ctypes.c_int64(count))
        if floats > len(self._work):
            self._work = torch.empty(floats)
        hidden = torch.empty(count, self._hidden)
        given = (tokens, positions, *writes, runs, self._work)
        batch = _Batch(*(0 if t is None else t.data_ptr() for t in given), count, len(writes[1]), len(runs))
        wrong = self._forward(
            ctypes.byref(self._model), self._layers, ctypes.byref(batch), ctypes.c_void_p(hidden.data_ptr())
        )
        if wrong >= 0:
            raise IndexError(
                f"row {wrong}: token {int(tokens[wrong])} or position {int(positions[wrong])} does not exist, or has no place"
            )
        return hidden

    def _layer(self, layer: Any, config: Any, keys: torch.Tensor, values: torch.Tensor) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        own = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        norms = (layer.input_layernorm, layer.post_attention_layernorm, *own)
        matrices: tuple[nn.Linear, ...] = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        for matrix in matrices:
            if type(matrix) is not nn.Linear:
                raise Unavailable(f"one of its matrices is a {type(matrix).__name__}")
        # Qwen's layers know whether they have a window; all of Mistral's take the configuration's.
        window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
        return _Layer(
            *(self._at(None if norm is None else norm.weight) for norm in norms),
            *(self._at(matrix.weight) for matrix in matrices),
            *(self._at(matrix.bias) for matrix in matrices),
            self._at(keys), self._at(values), window or 0,
        )  # fmt: skip

    def _at(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise Unavailable(f"some of its weights are {layout} {tensor.dtype} on {tensor.device.type}")
        self._keep.append(tensor)
        return tensor.data_ptr()


class NativeStep:
    """Logits of one token per slot, for the slots 0 .. n-1 of `cache`. Raises as `NativeForward`, which it is."""

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        self.forward = NativeForward(model, cache)
        self._cache, self.hidden = cache, torch.empty(0)
        slots = torch.arange(cache.slots)
        ones = torch.ones_like(slots)
        self._slots, self._runs = slots, run_table(slots, ones, slots, torch.zeros_like(slots))

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits [n, V] of tokens [n] at positions [n] (int64), whose keys and values are written; `longest` is not needed.

        Raises IndexError, before anything is written.
        """
        rows = tokens.shape[0]
        assert rows <= self._cache.slots and positions.shape == tokens.shape, (
            f"{rows} tokens for {self._cache.slots} slots"
        )
        runs = self._runs[:rows]
        runs[:, 3] = positions
        self.hidden = self.forward.hidden(tokens, positions, (None, self._slots[:rows], positions), runs)
        return linear(self.hidden, *self.forward.head)


def _check(model: FlatCausalLM, cache: SlotCache) -> None:
    config = model.model.config
    weight = model.head_parameters()[0]
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for wrong, reason in (
        (cache.device.type != "cpu", f"the device is {cache.device.type}"),
        (weight.dtype != torch.float32, f"the weights are {weight.dtype}"),
        (config.model_type not in FAMILIES, f"the model is a {config.model_type}"),
        (rope not in ROPES, f"its rotary embedding is {rope!r}"),
        (getattr(config, "hidden_act", "silu") != "silu", "its activation is not silu"),
    ):
        if wrong:
            raise Unavailable(reason)
