"""A transformers causal language model as katds calls it: flat tokens in, whatever a head function makes of it out.

The head function runs inside the one call of the head module. Under ZeRO-3 that is one gather of the head's weight,
however many vocabulary tiles a rank loops over, also where the head is tied to the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from katds.core.packing import attention_weight
from katds.models.folder import steady_tokens
from katds.models.plans import PackedPlan, SlotPlan
from katds.models.slot_cache import SlotCache

HeadFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]


class Forward(Protocol):
    """A `FlatCausalLM`, an engine around one, or code that computes the same."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: Any,
        head: Callable[..., Any] | None,
        rows: torch.Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Any: ...


class FlatCausalLM(nn.Module):
    """Wraps a `*ForCausalLM` model whose logits are head(last hidden state).

    Args:
        model: loaded with attn_implementation="katds".
        vocabulary: use only the first so many rows of the head (student and teacher may pad their vocabularies differently).
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self._vocabulary = vocabulary
        self._last_position = _last_position(model.config)
        # transformers looks both up anew at each access, which would cost a decode step a tenth of its time. A tuple keeps
        # them from being registered a second time.
        self._parts = (model.base_model, model.get_output_embeddings())
        rows = self._rows

        def forward(head: nn.Module, hidden: torch.Tensor, function: HeadFunction = linear) -> Any:
            return function(hidden, *rows(head))

        head = self.head
        head.forward = MethodType(forward, head)

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self._parts[1]
        return head

    def head_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, H] and bias of the head, as its functions see them."""
        return self._rows(self.head)

    def attention_weight(self) -> float:
        """How attention compares with the matrix products of this model; see `katds.core.packing.attention_weight`."""
        config = self.model.config
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        matrices = (m.weight for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D))
        # Under ZeRO-3 a weight is empty most of the time.
        parameters = sum(math.prod(getattr(weight, "ds_shape", weight.shape)) for weight in matrices)
        return attention_weight(config.num_hidden_layers, width, parameters)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: PackedPlan | SlotPlan,
        head: HeadFunction | None,
        rows: torch.Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Any:
        """Runs the flat tokens [N] and returns head(hidden [rows or N, H], weight [V, H], bias), or None without a head function.

        Under a `SlotPlan` the cache is written as a side effect, and tokens past the end of a model's positions share the last.
        """
        if cache is not None:
            assert isinstance(plan, SlotPlan)
            cache.prepare(plan)
            if self._last_position is not None:
                # A slot that writes past its end may be past the model's, too. Any place will do: what it writes there is never seen.
                position_ids = position_ids.clamp(max=self._last_position)
        base, output_head = self._parts
        hidden = base(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            past_key_values=cache,
            use_cache=cache is not None,
            plan=plan,
        ).last_hidden_state[0]
        if head is None:
            return None
        return output_head(hidden if rows is None else hidden[rows], head)

    def _rows(self, head: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = head.weight, head.bias
        if self._vocabulary < weight.shape[0]:
            return weight[: self._vocabulary], None if bias is None else bias[: self._vocabulary]
        return weight, bias


def _last_position(config: Any) -> int | None:
    """The last one that a model with a table of positions has a row for, or that leaves the angles of other texts as they are; None where
    rotary angles serve any position."""
    if (steady := steady_tokens(config)) is not None:
        return steady - 1
    if getattr(config, "rope_parameters", None):
        return None
    rows = getattr(config, "max_position_embeddings", None)
    return None if rows is None else rows - 1


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The plain head function: logits [N, V] in the model's dtype."""
    return nn.functional.linear(hidden, weight, bias)
