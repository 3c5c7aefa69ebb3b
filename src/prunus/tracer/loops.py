"""Loops over sizes: ``range(n)`` takes the plain int out of an integer, and nobody is asked."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunus.tracer.provenance import Provenance


class _Kind(type):
    """The class of what takes the place of ``range``: the same instances, other calls."""

    told: Callable[[Provenance], None]

    def __call__(cls, *bounds: Any) -> range:
        for bound in bounds:
            if isinstance(bound, Provenance):
                cls.told(bound)
        return range(*bounds)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, range)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, range)


@contextmanager
def follow_loops(model: nn.Module, counted: Callable[[Any, int], None]) -> Iterator[None]:
    """Hear of integers that the model's own code loops over.

    Python has no hook for this, so the modules in which the model's classes are written get a
    ``range`` of their own, for as long as the context lasts; it makes what ``range`` makes.
    """

    class Range(metaclass=_Kind):
        @staticmethod
        def told(bound: Provenance) -> None:
            counted(bound.expression, int.__add__(bound, 0))

    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    spaces = [
        vars(sys.modules[name])
        for name in names
        if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins")
    ]
    spaces = [space for space in spaces if space.get("range", builtins.range) is builtins.range]
    own = [space for space in spaces if "range" in space]
    try:
        for space in spaces:
            space["range"] = Range
        yield
    finally:
        for space in spaces:
            if any(space is one for one in own):
                space["range"] = builtins.range
            else:
                space.pop("range", None)
