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

    inform: Callable[[Provenance], None]

    def __call__(cls, *bounds: Any) -> range:
        for bound in bounds:
            if isinstance(bound, Provenance):
                cls.inform(bound)
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
        def inform(bound: Provenance) -> None:
            counted(bound.expression, int.__add__(bound, 0))

    spaces = [(space, "range" in space) for space in _spaces(model)]
    try:
        for space, _ in spaces:
            space["range"] = Range
        yield
    finally:
        for space, own in spaces:
            space["range"] = builtins.range
            if not own:
                del space["range"]


def _spaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Variables of the modules in which classes are written, where ``range`` is Python's."""
    kinds = {type(module) for module in model.modules()}
    for name in {base.__module__ for kind in kinds for base in kind.__mro__}:
        if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins"):
            space = vars(sys.modules[name])
            if space.get("range", builtins.range) is builtins.range:
                yield space
