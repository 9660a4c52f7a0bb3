"""A decode step of a Llama-like model in C (float32, CPU): what it asks of a model, and the call.

PyTorch spends some forty operator calls per layer and token step; on a model of a few million parameters they cost several
times the arithmetic. Here a step is one call; the matrix products are those of PyTorch's own BLAS.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from katds.models.causal import FlatCausalLM
from katds.models.native.build import Unavailable, functions, library
from katds.models.slot_cache import SlotCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MAX_DIM = 256  # that of decode.c
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
            for n in ("sgemm", "parallel", "embedding", "norm", "head", "head_bias", "cosine", "sine", "work")
        ),
        *((n, ctypes.c_int64) for n in ("layers", "hidden", "heads", "kv_heads", "dim", "inner", "tokens")),
        *((n, ctypes.c_int64) for n in ("vocabulary", "length", "threads")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class NativeStep:
    """Logits of one token per slot, for the slots 0 .. n-1 of `cache`.

    Args:
        model: with its weights in place; they must stay where they are as long as the step is used.

    Memory: activations of `cache.slots` rows, and the rotation angles of every position.

    Raises:
        Unavailable: this model, device, type or machine is not one for it.

    Not for two threads at once: they would share the work space.
    """

    def __init__(self, model: FlatCausalLM, cache: SlotCache) -> None:
        _check(model, cache)
        code = library()
        self._decode, work_floats = code.katds_decode, code.katds_work_floats
        self._decode.restype = work_floats.restype = ctypes.c_int64
        self._keep: list[torch.Tensor] = []  # whatever C points to
        config, base = model.model.config, model.model.base_model
        first = base.layers[0].self_attn
        positions = torch.arange(cache.length)[None]
        cosine, sine = (table[0].contiguous() for table in base.rotary_emb(torch.zeros(1), positions))
        weight, bias = model.head_parameters()
        self._vocabulary, self._slots = weight.shape[0], cache.slots
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        if cosine.shape[1] != dim:
            raise Unavailable(f"its rotary embedding turns {cosine.shape[1]} of {dim} dimensions")
        cache.reserve(len(base.layers), kv_heads, dim, weight.dtype)
        layers = [self._layer(layer, config, *cache.buffers(i)) for i, layer in enumerate(base.layers)]
        self._layers = (_Layer * len(layers))(*layers)
        inner = base.layers[0].mlp.gate_proj.out_features
        self._model = _Model(
            *functions(), self._at(base.embed_tokens.weight), self._at(base.norm.weight), self._at(weight),
            self._at(bias), self._at(cosine), self._at(sine), 0, len(layers), config.hidden_size, heads, kv_heads, dim,
            inner, base.embed_tokens.weight.shape[0], self._vocabulary, cache.length, torch.get_num_threads(),
            config.rms_norm_eps, first.scaling,
        )  # fmt: skip
        self._model.work = self._at(torch.empty(work_floats(ctypes.byref(self._model), ctypes.c_int64(cache.slots))))

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Logits [n, V] of tokens [n] at positions [n] (int64), whose keys and values are written; `longest` is not needed.

        Raises IndexError, before anything is written.
        """
        rows = tokens.shape[0]
        assert rows <= self._slots and positions.shape == tokens.shape, f"{rows} tokens for {self._slots} slots"
        for tensor in (tokens, positions):
            assert tensor.dtype == torch.int64 and tensor.is_contiguous(), f"{tensor.dtype} {tensor.stride()}"
        logits = torch.empty(rows, self._vocabulary)
        done = self._decode(
            ctypes.byref(self._model), self._layers, ctypes.c_int64(rows),
            *(ctypes.c_void_p(t.data_ptr()) for t in (tokens, positions, logits)),
        )  # fmt: skip
        if done != rows:
            raise IndexError(
                f"slot {done}: token {int(tokens[done])} or position {int(positions[done])} does not exist"
            )
        return logits

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
    dim = model.model.base_model.layers[0].self_attn.head_dim
    if dim > MAX_DIM:
        raise Unavailable(f"its heads have {dim} dimensions, more than {MAX_DIM}")
