"""The marks of traced integers: whose they are, whether they live, and how they hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prunus.graph.expressions import Expression, Operation, Width


class Run:
    """What one trace wants to know of its integers beside what the code computes with them.

    Parameters
    ----------
    made
        Called with the mark of every traced integer.
    apart
        Let traced integers hash unlike plain ones, and unlike one another unless they were
        computed alike: then no dict or cache that is keyed by a size answers with what was put
        there for another layer, model or run.  Otherwise they hash as they compare, and whoever
        hashes one computes with it.

    Attributes
    ----------
    hashed
        Whether any was hashed.
    """

    def __init__(self, made: Callable[[Mark], None], *, apart: bool) -> None:
        self.made = made
        self.apart = apart
        self.hashed = False

    def hash_of(self, expression: Expression) -> int:
        """Equal for integers of this run that were computed alike."""
        return hash((id(self), key_of(expression)))


class Mark:
    """Lives as long as the traced integer that holds it, to which no weak reference can be had."""

    __slots__ = ("__weakref__", "run")

    def __init__(self) -> None:
        self.run = _running[-1] if _running else None
        if self.run is not None:
            self.run.made(self)


_running: list[Run] = []
"""The traces that run, outermost first; one thread holds them all (``tracer.precision``)."""


@contextmanager
def marking(run: Run) -> Iterator[None]:
    """Within the context traced integers belong to a trace."""
    _running.append(run)
    try:
        yield
    finally:
        _running.remove(run)


def key_of(expression: Expression) -> str:
    """Equal for expressions that are computed alike from the same integers."""
    if isinstance(expression, Operation):
        return f"({key_of(expression.left)}{expression.op}{key_of(expression.right)})"
    return f"width {id(expression.label)}" if isinstance(expression, Width) else str(expression)
