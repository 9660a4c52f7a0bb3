"""What planning knows of a model: its configuration, and the sizes of its parameters in the order of their use. Nothing is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from katds.errors import ConfigError, first_sentence
from katds.models.causal import FlatCausalLM
from katds.plan.operators import Remembered


class _Attention(torch.autograd.Function):
    """Keeps and makes what katds's attention does (`katds.models.attention`), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    out = _Attention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)))
    return out.unsqueeze(0), None


Order = Sequence[Sequence[tuple[int, int]]]  # modules in the order of their use: (identity, elements) of each parameter


def _append(entered: list[tuple[tuple[int, int], ...]], own: tuple[tuple[int, int], ...], *_: Any) -> None:
    entered.append(own)


_NAME = "katds-plan"
AttentionInterface.register(_NAME, _attend)


def checkpoint_layers(model: FlatCausalLM) -> None:
    """As `katds.parallel.zero.load_student` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method will have another name in transformers 6
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model without its weights. Of equal configurations there is one, so that what was found of it is found again.

    Args:
        config: of transformers, the text model's.
        dtype: as DeepSpeed's JSON holds it.
        files: bytes of its checkpoint, where that is here.
    """

    name: str
    config: Any
    dtype: torch.dtype
    files: int = 0

    @classmethod
    def read(cls, path: Path, dtype: torch.dtype, field: str) -> ModelShape:
        """From the config.json in `path`, the only file that is read. Raises ConfigError, naming the setting `field`."""
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{field} is {path}, where there is no config.json (seen from {Path.cwd()}). Give a folder that holds the model's; a plan "
                "needs no other file of it."
            )
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True).get_text_config()
            files = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
            key = (path.name, type(config), config.to_json_string(use_diff=False), dtype, files)
            if (shape := _SHAPES.get(key)) is None:
                shape = cls(path.name, config, dtype, files)
                shape.model()
                _SHAPES[key] = shape
        except Exception as error:  # transformers raises many kinds
            raise ConfigError(
                f"{field} is {path}, whose config.json makes no language model ({first_sentence(error)}). Give a Hugging Face folder."
            ) from None
        return shape

    def model(self) -> FlatCausalLM:
        """On the meta device. Its attention only keeps what katds's does."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation=_NAME, dtype=self.dtype)
        return FlatCausalLM(model, self.vocabulary)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: some more than the tokens that katds computes, where the checkpoint pads its vocabulary."""
        return int(self.config.vocab_size)

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.heads)

    @property
    def inner(self) -> int:
        return int(getattr(self.config, "intermediate_size", None) or 4 * self.hidden)

    @cached_property
    def forward_order(self) -> Order:
        """Of every module, in the order in which a forward enters them, its own parameters, if it has any."""
        return self._order(backward=False, checkpointing=False)

    @cached_property
    def update_order(self) -> Order:
        """The same of a forward and its backward."""
        return self._order(backward=True, checkpointing=False)

    @cached_property
    def checkpointed_order(self) -> Order:
        """The same with activation checkpointing, whose backward enters each layer's modules a second time."""
        return self._order(backward=True, checkpointing=True)

    def _order(self, backward: bool, checkpointing: bool) -> Order:
        """As seen on the meta device."""
        model = self.model().train()
        if checkpointing:
            checkpoint_layers(model)
        names = {p: i for i, p in enumerate(model.parameters())}
        entered: list[tuple[tuple[int, int], ...]] = []
        for module in model.modules():
            own = tuple((names[p], p.numel()) for p in module.parameters(recurse=False))
            enter = partial(_append, entered, own)
            module.register_forward_pre_hook(enter)
            if own:
                module.register_full_backward_pre_hook(enter)
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        with torch.set_grad_enabled(backward), warnings.catch_warnings(), Remembered():
            warnings.simplefilter("ignore")  # a lookup's input has no gradient; that is known
            hidden = model.model.base_model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
            logits = model.head(hidden[0])
            if backward:
                logits.sum().backward()
        return entered

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each parameter; a tied one counts once."""
        return [p.numel() for p in self._model.parameters()]

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def bytes(self) -> int:
        return self.parameters * self.width

    @property
    def stored(self) -> int:
        """Bytes of its checkpoint: of the files, or in the type that its configuration says."""
        said = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else self.dtype
        return self.files or self.parameters * said.itemsize

    @cached_property
    def multiplied(self) -> int:
        """Weights that tokens are multiplied with: the head, but not the embedding that is only looked up; all experts."""
        linear = sum(math.prod(m.weight.shape) for m in self._model.modules() if isinstance(m, nn.Linear | Conv1D))
        return linear + self.experts

    @cached_property
    def experts(self) -> int:
        """Weights of experts, of which a token is multiplied with some: stacked in one parameter."""
        return sum(p.numel() for p in self._model.parameters() if p.dim() == 3)

    @property
    def token_flops(self) -> int:
        """Of a forward, per token, attention left out."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        among = next((count for name in names if (count := getattr(self.config, name, None))), 1)
        chosen = self.experts * min(among, getattr(self.config, "num_experts_per_tok", None) or among) // among
        return 2 * (self.multiplied - self.experts + chosen)

    @property
    def pair_flops(self) -> int:
        """Of a forward, per pair of a token and one that it attends to."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def attention_weight(self) -> float:
        """See `katds.core.packing.attention_weight`."""
        return self._model.attention_weight()

    @property
    def key_bytes(self) -> int:
        """Of one token in a slot cache: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.width

    @cached_property
    def _model(self) -> FlatCausalLM:
        return self.model()


_SHAPES: dict[tuple[Any, ...], ModelShape] = {}
