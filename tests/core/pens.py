"""Teachers that write, for tests: one by a plan, and a real model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from katds.core.collective import Collective, Solo
from katds.core.counter import key


class ScriptedPen:
    """Implements `katds.core.objectives.base.Pen`: writes what `plan` holds for a prefix, else up to 6 tokens from a hash of it.

    Args:
        embeddings_VH: by default random ones of 13 tokens.
    """

    def __init__(
        self,
        collective: Collective | None = None,
        plan: Mapping[tuple[int, ...], Sequence[int]] | None = None,
        embeddings_VH: torch.Tensor | None = None,
    ) -> None:
        self._collective = collective or Solo()
        self._plan = plan or {}
        drawn = torch.randn(13, 6, generator=torch.Generator().manual_seed(2))
        self._embeddings_VH = drawn if embeddings_VH is None else embeddings_VH
        self.prefixes: list[tuple[int, ...]] = []
        self.tokens = 0  # read and asked for

    def write(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
        self._collective.gather("write")  # waits for all ranks, as the real one does
        self.prefixes += map(tuple, prefixes)
        self.tokens += sum(map(len, prefixes)) + sum(tokens)
        return [self.continuation(tuple(prefix), count) for prefix, count in zip(prefixes, tokens, strict=True)]

    def continuation(self, prefix: tuple[int, ...], tokens: int) -> list[int]:
        if prefix in self._plan:
            return list(self._plan[prefix][:tokens])
        length = min(1 + key(1, *prefix) % 6, tokens)
        return [key(2, i, *prefix) % len(self._embeddings_VH) for i in range(length)]

    def embed(self, ids: torch.Tensor, output: bool = False) -> torch.Tensor:
        """Its head has the rows of the embeddings in another order."""
        self._collective.gather("embed")
        return (self._embeddings_VH.flip(0) if output else self._embeddings_VH)[ids]


class ModelPen:
    """A transformers model that decodes greedily, by its own `generate`."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def write(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
        return [self._continuation(list(prefix), count) for prefix, count in zip(prefixes, tokens, strict=True)]

    def _continuation(self, prefix: list[int], tokens: int) -> list[int]:
        written = self._model.generate(torch.tensor([prefix]), max_new_tokens=tokens, do_sample=False)
        return written[0, len(prefix) :].tolist()

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, output: bool = False) -> torch.Tensor:
        table = self._model.get_output_embeddings() if output else self._model.get_input_embeddings()
        return table.weight[ids].float()
