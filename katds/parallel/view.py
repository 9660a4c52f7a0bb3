"""The student's whole weights for the length of a rollout phase, without hooks.

A second copy of the module tree, made once on the meta device, gets its parameters in one of two ways. A `StudentView` borrows
the storage of the gathered ZeRO-3 parameters: one full copy of the parameters while it is open, nothing afterwards. A
`StudentCopy` owns storage: one full copy for good, at addresses that never change, so that CUDA graphs survive from phase to
phase. The forward of either runs no DeepSpeed hook, so a decode step costs what it costs in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import nn

from katds.models.causal import FlatCausalLM


class _Twin:
    """The skeleton's places for parameters, each with the partitioned parameter that belongs there.

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


class StudentView(_Twin):
    """Hook-free twin of a ZeRO-3 model that borrows its weights."""

    @contextmanager
    def open(self) -> Iterator[FlatCausalLM]:
        """Collective: gathers all parameters; on exit the gathered storage is released on every rank."""
        with self._whole() as whole:
            for owner, name, parameter in self._links:
                owner._parameters[name] = nn.Parameter(whole[parameter], requires_grad=False)
            try:
                with torch.no_grad():
                    yield self._skeleton
            finally:
                whole.clear()
                for owner, name, _ in self._links:
                    owner._parameters[name] = None  # or the gathered storage would live on

    @contextmanager
    def _whole(self) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
        """Collective: every parameter's gathered storage. Those on NVMe are read one by one, and let go of before the next: DeepSpeed has
        buffers for a few shards at a time only (offload_param.buffer_count)."""
        shards: list[Any] = [parameter.ds_tensor for parameter in self._parameters]  # type: ignore[attr-defined]
        if not any(shard.final_location == OffloadDeviceEnum.nvme for shard in shards):
            with deepspeed.zero.GatheredParameters(self._parameters):
                yield {parameter: parameter.data for parameter in self._parameters}
            return
        whole = {}
        for parameter in self._parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[parameter] = parameter.data
        yield whole


class StudentCopy(_Twin):
    """Hook-free twin of a ZeRO-3 model with weights of its own.

    Invariants: once made, a weight stays at its address. Besides the copy, no more than one parameter is ever gathered.
    """

    def __init__(self, source: FlatCausalLM, skeleton: FlatCausalLM) -> None:
        super().__init__(source, skeleton)
        self._own: dict[nn.Parameter, nn.Parameter] = {}
        self._version: object = None

    @contextmanager
    def open(self, version: object) -> Iterator[FlatCausalLM]:
        """Collective: copies the weights in unless those of this `version` are there; it must be the same on all ranks."""
        if version != self._version:
            self._version = None  # should a gather fail half-way
            with torch.no_grad():
                self._refresh()
            self._version = version
        with torch.no_grad():
            yield self._skeleton

    def _refresh(self) -> None:
        for parameter in self._parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                if parameter in self._own:
                    self._own[parameter].copy_(parameter.data)
                else:
                    self._own[parameter] = nn.Parameter(parameter.data.clone(), requires_grad=False)
        for owner, name, parameter in self._links:
            owner._parameters[name] = self._own[parameter]


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
