"""Operators on the meta device, each of which is asked once: their own Python costs most of a pass over a model without numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Results:
    """Of operators on the meta device. A layer asks for what the one before it has asked for: then the operator, whose own Python costs
    most of a trace, is not asked again, unless it writes to a tensor or its result shares one's storage."""

    def __init__(self) -> None:
        self._pure: dict[Any, bool] = {}
        self._known: dict[Any, Any] = {}

    def of(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns."""
        pure = self._pure.get(function)
        if pure is None:
            schema = function._schema
            pure = self._pure[function] = not any(each.alias_info for each in (*schema.arguments, *schema.returns))
        if not pure:
            return function(*args, **kwargs)
        given: list[torch.Tensor] = []
        key = (function, _key(args, given), _key(kwargs, given))
        if (known := self._known.get(key)) is None:
            result = function(*args, **kwargs)
            self._known[key] = _made_anew(result, given)
            return result
        return known() if known else function(*args, **kwargs)


def _key(value: Any, given: list[torch.Tensor]) -> Any:
    """All that a result on the meta device depends on; tensors are added to `given`."""
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple([_key(each, given) for each in value])
    if isinstance(value, dict):
        return tuple([(name, _key(each, given)) for name, each in value.items()])
    return type(value), value  # 1, 1.0 and True are equal


def _made_anew(result: Any, given: Sequence[torch.Tensor]) -> Callable[[], Any] | Literal[False]:
    """Makes such a result once more; False: only the operator can, since it is, or shares, what there was before."""
    tensors = list(result) if isinstance(result, list | tuple) else [result]
    storages = {tensor.untyped_storage()._cdata for tensor in (*given, *tensors) if isinstance(tensor, torch.Tensor)}
    plain = all(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors)
    if not plain or len(storages) < len({tensor.untyped_storage()._cdata for tensor in given}) + len(tensors):
        return False
    shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]

    def empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    if any(
        empty(*shape).untyped_storage().nbytes() != x.untyped_storage().nbytes()
        for shape, x in zip(shapes, tensors, strict=True)
    ):
        return False
    if isinstance(result, torch.Tensor):
        return partial(empty, *shapes[0])
    kind = type(result)
    return lambda: kind([empty(*shape) for shape in shapes])


class Remembered(TorchDispatchMode):
    """While it is open operators are asked once; see `Results`."""

    def __init__(self) -> None:
        super().__init__()
        self._results = Results()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._results.of(function, args, kwargs or {})
