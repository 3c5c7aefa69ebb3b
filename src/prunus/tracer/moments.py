"""How many bytes of tensors are alive at which moment of a forward."""

from __future__ import annotations

from collections import defaultdict

from prunus.graph.axis import Label
from prunus.graph.polynomial import Monomial, Polynomial, TimePoints, drop_dominated
from prunus.graph.program import Program
from prunus.tracer.widths import Widths


def find_moments(program: Program, known: tuple[Label, ...]) -> TimePoints:
    """The moments of a program that may be the worst.

    Parameters
    ----------
    known
        The labels of the other costs, which keep their indices.

    Notes
    -----
    The most is alive when an operator has made its outputs and nothing has died yet, so only
    moments before a death are looked at.
    """
    widths = Widths(program.resolve, known)
    count = len(program.nodes)
    born: dict[int, list[Polynomial]] = defaultdict(list)
    died: dict[int, list[Polynomial]] = defaultdict(list)
    for one in program.lifetimes:
        span = tuple(zip(program.shapes[one.value], program.labels[one.value], strict=True))
        size = widths.polynomial([span]).times(one.element_size)
        born[one.born].append(size)
        died[count if one.died is None else one.died].append(size)
    alive: dict[tuple[int, ...], int] = defaultdict(int)
    found: dict[str, Polynomial] = {}
    for moment, node in enumerate(program.nodes):
        _add(alive, born[moment], 1)
        if died[moment + 1] or moment + 1 == count:
            name = f"{node.module or 'the forward'} (operator {moment})"
            terms = (Monomial(c, key) for key, c in alive.items() if c and key)
            found[name] = Polynomial(alive[()], tuple(terms))
        _add(alive, died[moment + 1], -1)
    return TimePoints(tuple(widths.labels), drop_dominated(found))


def _add(alive: dict[tuple[int, ...], int], sizes: list[Polynomial], sign: int) -> None:
    for size in sizes:
        alive[()] += sign * size.fixed
        for term in size.terms:
            alive[term.widths] += sign * term.constant
