"""New values for the attributes that govern widths, once it is known what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunus.graph.axis import Mask
from prunus.graph.expressions import (
    Attribute,
    Condition,
    Equation,
    Width,
    attributes_in,
    evaluate,
    holds,
    invert,
)


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
    for equation in sorted(equations, key=lambda one: not isinstance(one.expression, Attribute)):
        if not isinstance(equation.expression, Attribute):
            if not _holds(equation, values, width):
                _settle(equation, values, settled, width)
        elif equation.expression not in settled:
            values[equation.expression] = width(equation.width)
            settled.add(equation.expression)
    broken = tuple(e for e in equations if not _holds(e, values, width))
    return Solution(values, broken)


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
    width = _measure(kept)
    found = solution.values.__getitem__
    return [i for i, one in enumerate(conditions) if not holds(one, found, width)]


def _measure(kept: Mask) -> Callable[[Width], int]:
    counts: dict[int, int] = {}

    def width(of: Width) -> int:
        if of.label is None:
            return of.size
        if id(of.label) not in counts:
            counts[id(of.label)] = int(kept[of.label].all(axis=1).sum())
        return counts[id(of.label)]

    return width


def _holds(
    equation: Equation, values: Mapping[Attribute, int], width: Callable[[Width], int]
) -> bool:
    try:
        found = evaluate(equation.expression, values.__getitem__, width)
    except ZeroDivisionError:
        return False
    return found == width(equation.width)
