"""Integer expressions over attributes and widths, and the attribute values that satisfy them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunus.graph.axis import Label, Mask


@dataclass(frozen=True, slots=True, order=True)
class Attribute:
    """An integer that a module keeps: its path, and the way to it inside containers.

    >>> str(Attribute("encoder.layers.0", "sizes", (1,)))
    'encoder.layers.0.sizes[1]'
    """

    module: str
    name: str
    keys: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        place = f"{self.module}.{self.name}" if self.module else self.name
        return place + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.keys)


@dataclass(frozen=True, eq=False, slots=True)
class Width:
    """The number of positions that stay in a labelled dim of ``size``; fixed without label."""

    size: int
    label: Label | None


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """``left op right`` with op one of ``+ - * // %``."""

    op: str
    left: Expression
    right: Expression


Expression = int | Attribute | Width | Operation

_COMPUTE: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True, eq=False, slots=True)
class Equation:
    """The forward demands that the expression is the width of a dim; ``source`` is the line."""

    expression: Expression
    width: Width
    module: str
    source: str


@dataclass(frozen=True, eq=False, slots=True)
class Condition:
    """The forward asks for ``left op right``, op one of ``== < <= > >=``; it has to come out so."""

    op: str
    left: Expression
    right: Expression
    outcome: bool
    module: str
    source: str


def leaves_of(expression: Expression) -> Iterator[Expression]:
    """The integers, attributes and widths that an expression is computed from."""
    if isinstance(expression, Operation):
        yield from leaves_of(expression.left)
        yield from leaves_of(expression.right)
    else:
        yield expression


def attributes_in(expression: Expression) -> Iterator[Attribute]:
    """Every attribute of an expression, with repetition."""
    return (leaf for leaf in leaves_of(expression) if isinstance(leaf, Attribute))


def evaluate(
    expression: Expression, attribute: Callable[[Attribute], int], width: Callable[[Width], int]
) -> int:
    """The expression's value; ZeroDivisionError where the code itself would raise it."""
    if isinstance(expression, Attribute):
        return attribute(expression)
    if isinstance(expression, Width):
        return width(expression)
    if isinstance(expression, Operation):
        left = evaluate(expression.left, attribute, width)
        return _COMPUTE[expression.op](left, evaluate(expression.right, attribute, width))
    return expression


def invert(
    expression: Expression,
    value: int,
    unknown: Attribute,
    attribute: Callable[[Attribute], int],
    width: Callable[[Width], int],
) -> int | None:
    """The value of ``unknown`` that makes the expression ``value``, or None.

    >>> half = Operation("//", Attribute("", "dim"), 2)
    >>> invert(half, 5, Attribute("", "dim"), lambda a: 0, lambda w: w.size)
    10
    """
    if expression == unknown:
        return value
    if not isinstance(expression, Operation):
        return None
    sides = expression.left, expression.right
    left, right = (unknown in attributes_in(side) for side in sides)
    if left and right:
        return None
    known, rest = sides if right else sides[::-1]
    other = evaluate(known, attribute, width)
    target = _undo(expression.op, value, other, first=left)
    return None if target is None else invert(rest, target, unknown, attribute, width)


def _undo(op: str, value: int, other: int, *, first: bool) -> int | None:
    """x with ``x op other == value`` (or ``other op x`` if not ``first``), the natural one."""
    if op == "+":
        return value - other
    if op == "-":
        return value + other if first else other - value
    if op == "*":
        return _divided(value, other)
    if op == "//":
        return value * other if first else _divided(other, value)
    return None


def _divided(value: int, by: int) -> int | None:
    return value // by if by and value % by == 0 else None


@dataclass(frozen=True)
class Solution:
    """Values of all attributes that equations speak of, and the equations that no value meets."""

    values: Mapping[Attribute, int]
    broken: tuple[Equation, ...]


def solve(equations: Sequence[Equation], current: Mapping[Attribute, int], kept: Mask) -> Solution:
    """Values under which the forward's code states the widths that are left.

    An attribute that stands alone in an equation takes the width; one that only stands in
    expressions keeps its value where that will do, and else the value that an equation demands.
    """
    width = _measure(kept)
    values = dict(current)
    settled: set[Attribute] = set()

    def holds(equation: Equation) -> bool | None:
        return _compare("==", equation.expression, equation.width, values.__getitem__, width)

    for equation in sorted(equations, key=lambda one: not isinstance(one.expression, Attribute)):
        if not isinstance(equation.expression, Attribute):
            if not holds(equation):
                _settle(equation, values, settled, width)
        elif equation.expression not in settled:
            values[equation.expression] = width(equation.width)
            settled.add(equation.expression)
    return Solution(values, tuple(equation for equation in equations if not holds(equation)))


def _settle(
    equation: Equation,
    values: dict[Attribute, int],
    settled: set[Attribute],
    width: Callable[[Width], int],
) -> None:
    """Give the one free attribute of an equation the value that it demands, if there is one."""
    free = sorted(set(attributes_in(equation.expression)) - settled)
    if len(free) == 1:
        demanded = width(equation.width)
        found = invert(equation.expression, demanded, free[0], values.__getitem__, width)
        if found is not None:
            values[free[0]] = found
            settled.add(free[0])


def other_paths(conditions: Sequence[Condition], solution: Solution, kept: Mask) -> list[int]:
    """Which comparisons would come out otherwise than they did at full size."""
    known = solution.values.__getitem__, _measure(kept)
    return [
        place
        for place, one in enumerate(conditions)
        if _compare(one.op, one.left, one.right, *known) is not one.outcome
    ]


def _measure(kept: Mask) -> Callable[[Width], int]:
    counts: dict[int, int] = {}

    def width(of: Width) -> int:
        if of.label is None:
            return of.size
        if id(of.label) not in counts:
            counts[id(of.label)] = int(kept[of.label].all(axis=1).sum())
        return counts[id(of.label)]

    return width


def _compare(
    op: str,
    left: Expression,
    right: Expression,
    attribute: Callable[[Attribute], int],
    width: Callable[[Width], int],
) -> bool | None:
    """Whether ``left op right``; None where the code itself would divide by zero."""
    try:
        sides = (evaluate(side, attribute, width) for side in (left, right))
        return bool(_COMPUTE[op](*sides))
    except ZeroDivisionError:
        return None
