"""The student's whole weights for the length of a rollout phase, without hooks.

A second copy of the module tree, made once on the meta device, borrows the storage of the gathered ZeRO-3 parameters.
Its forward runs no DeepSpeed hook, so a decode step costs what it costs in plain PyTorch. Memory: one full copy of the
parameters while the view is open, nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from katds.models.causal import FlatCausalLM


class StudentView:
    """Hook-free twin of a ZeRO-3 model.

    Args:
        source: the wrapped model that DeepSpeed has partitioned.
        skeleton: the same architecture on the meta device.
    """

    def __init__(self, source: FlatCausalLM, skeleton: FlatCausalLM) -> None:
        self._skeleton = skeleton.eval()
        for (name, buffer), (other, _) in zip(source.named_buffers(), skeleton.named_buffers(), strict=True):
            assert name == other, f"buffers differ between the student and its view: {name} and {other}"
            _owner(skeleton, name)._buffers[name.rpartition(".")[2]] = buffer
        # Tied weights appear under each of their names, so that the view ties them too.
        source_parameters = dict(source.named_parameters(remove_duplicate=False))
        view_names = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
        assert set(view_names) == set(source_parameters), "the student and its view have different parameters"
        self._links = [
            (_owner(skeleton, name), name.rpartition(".")[2], source_parameters[name]) for name in view_names
        ]
        self._parameters = list(source.parameters())

    @contextmanager
    def open(self) -> Iterator[FlatCausalLM]:
        """Collective: gathers all parameters; on exit the gathered storage is released on every rank."""
        with deepspeed.zero.GatheredParameters(self._parameters):
            for owner, name, parameter in self._links:
                owner._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
            try:
                with torch.no_grad():
                    yield self._skeleton
            finally:
                for owner, name, _ in self._links:
                    owner._parameters[name] = None  # or the gathered storage would live on


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
