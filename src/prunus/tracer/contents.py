"""The values of tensors that a forward may write into, to be put back byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors that are one array in one storage, if they are strided."""


class Contents:
    """What is in the memory of a model's buffers and tensor attributes, as it is now.

    Of parameters only those are copied that PyTorch's own forwards write (embeddings with
    ``max_norm``): no other module changes a weight by being run.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved = [(storage, storage.clone()) for storage in _storages(modules)]

    def restore(self) -> None:
        """Put the bytes back; may be called again."""
        for storage, values in self._saved:
            if storage.nbytes() != values.nbytes():  # the observers of QAT resize their buffers
                storage.resize_(values.nbytes())
            storage.copy_(values)


def _storages(modules: Iterable[nn.Module]) -> Iterator[Any]:
    seen: set[int] = set()
    for module in modules:
        for tensor in _written(module):
            if type(tensor) not in _PLAIN or tensor.is_meta or is_odd(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def _written(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of one module, also those in its lists and dicts, that a forward may write into."""
    parameters = () if vars(module).get("max_norm") is None else module._parameters.values()
    yield from (one for one in (*module._buffers.values(), *parameters) if one is not None)
    for value in vars(module).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if type(item) is Tensor)


def is_odd(tensor: Tensor) -> bool:
    """Whether it is not one strided array in one storage."""
    return tensor.layout != torch.strided or tensor.is_nested
