"""Example inputs as plain data: shapes and types in nested containers, rebuilt on demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import TraceError


def describe_inputs(args: Any, kwargs: Any) -> Any:
    """A JSON-able description of a call's arguments; None where one can't be described.

    >>> describe_inputs((torch.zeros(1, 3),), {"flag": True})
    {'args': [{'tensor': [1, 3], 'dtype': 'float32'}], 'kwargs': {'flag': True}}
    """
    try:
        return {
            "args": [_describe(value) for value in args],
            "kwargs": {name: _describe(value) for name, value in kwargs.items()},
        }
    except TypeError:
        return None


def rebuild_inputs(
    spec: Any, model: nn.Module, *, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the described shapes: seeded normal numbers, zeros for integers.

    They lie on the device of the model's first parameter.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    try:
        args = tuple(_rebuild(value, generator, device) for value in spec["args"])
        named = spec["kwargs"].items()
        kwargs = {name: _rebuild(value, generator, device) for name, value in named}
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError("the description of the inputs is damaged", why=str(error)) from error
    return args, kwargs


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(name): _describe(item) for name, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain data")


def _rebuild(value: Any, generator: torch.Generator, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rebuild(item, generator, device) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        named = value["dict"].items()
        return {name: _rebuild(item, generator, device) for name, item in named}
    dtype = getattr(torch, value["dtype"])
    if dtype.is_floating_point:
        return torch.randn(value["tensor"], generator=generator).to(device, dtype)
    return torch.zeros(value["tensor"], dtype=dtype, device=device)
