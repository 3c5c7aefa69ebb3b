"""Integers that remember how they were computed: a subclass of int that carries an expression."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from prunus.graph.expressions import Expression, Operation, Width
from prunus.tracer.sources import is_users


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


class Mark:
    """Lives as long as the traced integer that holds it, to which no weak reference can be had."""

    __slots__ = ("__weakref__", "run")

    def __init__(self) -> None:
        self.run = _running[-1] if _running else None
        if self.run is not None:
            self.run.made(self)


_running: list[Run] = []
"""The traces that run, outermost first; one thread holds them all (``tracer.precision``)."""

listeners: dict[Any, None] = {}
"""Their :class:`~prunus.tracer.sizes.Sizes`, which hear what the code does with the integers."""


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


class Provenance(int):
    """An int that carries the expression it was computed by; results of + − * // % do as well.

    These and comparisons are defined below the class, as are operators whose results carry none.
    """

    expression: Expression
    mark: Mark

    def __new__(cls, value: int, expression: Expression) -> Provenance:
        made = super().__new__(cls, value)
        made.expression = expression
        made.mark = Mark()
        return made

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << int(other)) if _is_plain(other) else _escaped(self) >> other

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << int(other)) if _is_plain(other) else _escaped(self) << other

    def __invert__(self) -> Any:
        return -1 - self

    def __ne__(self, other: Any) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        run = self.mark.run
        if run is None:
            return int.__hash__(self)
        run.hashed = True
        return hash((id(run), key_of(self.expression))) if run.apart else hash(_escaped(self))

    def __bool__(self) -> bool:
        return bool(_compare("bool", self, 0, int.__ne__(self, 0)))

    def __neg__(self) -> Any:
        return Provenance(-plain(self), Operation("-", 0, self.expression))

    def __pos__(self) -> Any:
        return self

    __trunc__ = __floor__ = __ceil__ = conjugate = __pos__
    real = numerator = property(conjugate)

    def __abs__(self) -> Any:
        return self if int.__ge__(self, 0) else -self

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None or digits >= 0 else round(_escaped(self), digits)

    def __int__(self) -> int:
        return _cast(self)

    def __truediv__(self, other: Any) -> Any:
        return _ratio(self, other) if isinstance(other, int) else _escaped(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return _ratio(other, self) if isinstance(other, int) else other / _escaped(self)

    def __str__(self) -> str:
        return str(_spelt(self))

    def __repr__(self) -> str:
        return repr(_spelt(self))

    def __format__(self, how: str) -> str:
        return format(_spelt(self), how)

    def as_integer_ratio(self) -> Any:
        return self, 1

    def __copy__(self) -> int:
        return plain(self)

    def __deepcopy__(self, memo: Any) -> int:
        return plain(self)

    def __reduce__(self) -> Any:
        return int, (plain(self),)


_FOLLOWED = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
_COMPARED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ESCAPING: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("__and__", "__rand__"), operator.and_),
    **dict.fromkeys(("__or__", "__ror__"), operator.or_),
    **dict.fromkeys(("__xor__", "__rxor__"), operator.xor),
    "__rrshift__": lambda number, other: other >> number,
    "__rlshift__": lambda number, other: other << number,
    "__pow__": pow,
    "__rpow__": lambda number, other, modulus=None: pow(other, number, modulus),
    "__float__": float,
    "bit_length": int.bit_length,
    "bit_count": int.bit_count,
    "to_bytes": int.to_bytes,
}
"""Operators whose result carries no expression, so that the size they compute with escapes."""


def _define_operators() -> None:
    """Give :class:`Provenance` its operators, by the three tables above."""

    def followed(op: str, name: str, swapped: bool) -> Callable[..., Any]:
        compute = getattr(int, name)
        return lambda a, b: _combine(op, a, b, compute(a, b), swapped=swapped)

    def compared(op: str, name: str) -> Callable[..., Any]:
        compute = getattr(int, name)
        return lambda a, b: _compare(op, a, b, compute(a, b))

    def escaping(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda a, *args, **kwargs: compute(_escaped(a), *args, **kwargs)

    for name, op in _FOLLOWED.items():
        setattr(Provenance, f"__{name}__", followed(op, f"__{name}__", False))
        setattr(Provenance, f"__r{name}__", followed(op, f"__r{name}__", True))
    for name, op in _COMPARED.items():
        setattr(Provenance, f"__{name}__", compared(op, f"__{name}__"))
    for name, compute in _ESCAPING.items():
        setattr(Provenance, name, escaping(compute))


_define_operators()


class Ratio(float):
    """The quotient of two such integers, where it is whole: ``int()`` of it is followed.

    Whatever else is done with it is arithmetic that is not.
    """

    expression: Expression

    def __int__(self) -> int:
        value = int(float.__trunc__(self))
        for listener in listeners:
            listener.cast(self.expression, value, self)
        return value

    __trunc__ = __floor__ = __ceil__ = __int__

    def __round__(self, digits: Any = None) -> Any:
        return self.__int__() if digits is None else self


def plain(number: int) -> int:
    """The same number without its expression; nobody is told."""
    return int.__add__(number, 0)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, Provenance)


def _combine(op: str, a: Provenance, b: Any, value: Any, *, swapped: bool) -> Any:
    """The result of arithmetic; with floats, or as how often a list repeats, a size escapes."""
    if value is NotImplemented:
        if isinstance(b, (float, complex, list, tuple, str)):
            _escaped(a)
        return value
    if isinstance(b, bool):
        return value
    other = b.expression if isinstance(b, Provenance) else int(b)
    left, right = (other, a.expression) if swapped else (a.expression, other)
    return Provenance(value, Operation(op, left, right))


def _compare(op: str, a: Provenance, b: Any, outcome: Any) -> Any:
    """Tell whoever traces that the code asks how two integers compare."""
    if outcome is not NotImplemented and listeners:
        other = expression_of(b)
        if other is not None:
            for listener in listeners:
                listener.compared(op, a.expression, other, outcome)
    elif isinstance(b, float):
        _escaped(a)
    return outcome


def _escaped(number: Provenance) -> int:
    """The plain number, of which whoever traces is told that the code computes with it."""
    for listener in listeners:
        listener.escaped(number.expression)
    return plain(number)


def _spelt(number: Provenance) -> int:
    """The plain number, which the forward's own code writes down: in a key or a name, as a rule."""
    return _escaped(number) if listeners and is_users(sys._getframe(2)) else plain(number)


def _cast(number: Provenance) -> int:
    """``int(number)``; numpy asks for it as well, where a product of sizes can be followed."""
    value, expression = plain(number), number.expression
    if listeners:
        product = _product_in_numpy(sys._getframe(2))
        if product is not None:
            value, expression = plain(product), product.expression
        for listener in listeners:
            listener.cast(expression, value, None)
    return plain(number)


def _product_in_numpy(frame: Any) -> Provenance | None:
    """What ``numpy.prod`` is about to return, if that is what runs."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("numpy"):
        if frame.f_code.co_name == "prod":
            factors, product = frame.f_locals.get("a"), 1
            if not isinstance(factors, (tuple, list)):
                return None
            for factor in factors:
                product = product * factor
            return product if isinstance(product, Provenance) else None
        frame = frame.f_back
    return None


def _ratio(a: int, b: int) -> Any:
    """``a / b`` of integers, at least one of which has an expression."""
    value = plain(a) / plain(b)
    left, right = expression_of(a), expression_of(b)
    whole = left is not None and right is not None and value.is_integer()
    if not whole or not _is_argument(sys._getframe(2)):
        for number in (a, b):
            if isinstance(number, Provenance):
                _escaped(number)
        return value
    found = Ratio(value)
    found.expression = Operation("//", left, right)  # type: ignore[arg-type]
    for listener in listeners:
        listener.divided(found)
    return found


def _is_argument(frame: Any) -> bool:
    """Whether what the frame computes at present goes into a call of one argument, as ``int``."""
    following = (
        one
        for one in dis.get_instructions(frame.f_code)
        if one.offset > frame.f_lasti and one.opname not in ("CACHE", "PRECALL")
    )
    then = next(following, None)
    return then is not None and then.opname in ("CALL", "CALL_FUNCTION") and then.arg == 1


def expression_of(value: Any) -> Expression | None:
    """The expression of an int: itself for a plain one, None for anything else."""
    if isinstance(value, Provenance):
        return value.expression
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return int(value) if whole else None
