"""When the memory of tensors comes and goes while the forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunus.graph.program import Lifetime


class Lifetimes:
    """Takes down births and deaths as they happen: Python alone knows how long a tensor lives.

    A module's input, say, lives as long as the module runs, since its caller holds it.

    Parameters
    ----------
    clock
        How many operators have run.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.found: list[Lifetime] = []
        self._clock = clock
        self._alive: dict[int, tuple[Lifetime, weakref.ref[Any]]] = {}

    def begin(self, tensor: Tensor, value: int) -> None:
        """A tensor has come; nothing happens where its memory is known already."""
        if tensor.layout != torch.strided:
            return  # sparse: its memory is that of several tensors
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        one = Lifetime(value, tensor.element_size(), self._clock())
        self.found.append(one)
        self._alive[key] = one, weakref.ref(storage, lambda _: self._end(key))

    def _end(self, key: int) -> None:
        self._alive.pop(key)[0].died = self._clock()
