"""Sizes that the forward states: whether attributes can follow, and what is tied or pinned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from prunus.graph.axis import Label, Mask
from prunus.graph.expressions import (
    Condition,
    Equation,
    Expression,
    Operation,
    Width,
    attributes_in,
    other_paths,
    solve,
)
from prunus.graph.groups import Pin
from prunus.tracer.capture import Recorder
from prunus.tracer.labels import Algebra
from prunus.tracer.units import Resolve, Resolver

SHORT = 64
"""A dim that is longer is never left empty by chance."""

TRIALS = 6
"""Random selections under which an equation has to be solvable before its groups may be pruned."""


def pin_unsolvable(recorder: Recorder, names: list[str]) -> Resolver:
    """Pin what an equation speaks of where no attribute's value can make it hold.

    Equations are checked under random selections, so those that hold by construction (heads ×
    dims of a view) cost nothing.  Every round ties or pins something, so there is a last one,
    whose units are returned.
    """
    while True:
        resolver = recorder.resolver(names)
        equations = [in_units(equation, resolver) for equation in recorder.sizes.equations]
        conditions = [condition_in_units(one, resolver) for one in recorder.sizes.conditions]
        trials = range(TRIALS) if equations or conditions else ()
        kept = (_draw(resolver, seed) for seed in trials)
        if not any(_settle(recorder, equations, conditions, mask) for mask in kept):
            return resolver


def _settle(
    recorder: Recorder, equations: list[Equation], conditions: list[Condition], kept: Mask
) -> bool:
    """Tie or pin what does not hold under a selection; whether there was anything."""
    sizes = recorder.sizes
    solution = solve(equations, sizes.attributes, kept)
    broken = [index for index, one in enumerate(equations) if one in solution.broken]
    changed = [_make_solvable(recorder, sizes.equations[index]) for index in broken]
    others = other_paths(conditions, solution, kept)
    changed += [_keep_path(recorder, sizes.conditions[index]) for index in others]
    return any(changed)


def _draw(resolver: Resolver, seed: int) -> Mask:
    """A random selection that leaves no dim empty, as no plan does."""
    kept = np.random.default_rng(seed).random(resolver.count + 1) > 0.1 + 0.1 * seed
    kept[0] = True
    for label in resolver.axes.values():
        if len(label) <= SHORT and not kept[label].all(axis=1).any():
            kept[label[seed % len(label)]] = True
    return kept


def _make_solvable(recorder: Recorder, equation: Equation) -> bool:
    """Tie or pin what keeps an equation from holding; False where nothing is left to do.

    What the attributes govern elsewhere is pinned only where nothing that the equation itself
    speaks of is free.
    """
    expression, label = equation.expression, equation.width.label
    algebra = recorder.algebra
    if algebra.canonical(label) is not None and _tie_multiple(recorder, equation):
        return True
    why = Pin("the code computes a size that can't follow", "", equation.module, equation.source)
    own = [label, *_labels_in(expression)]
    named = set(attributes_in(expression))
    elsewhere = [
        other.width.label
        for other in recorder.sizes.equations
        if not named.isdisjoint(attributes_in(other.expression))
    ]
    for labels in (own, elsewhere):
        free = [one for one in labels if algebra.canonical(one) is not None]
        for one in free:
            algebra.pin(one, why)
        if free:
            return True
    return False


def _keep_path(recorder: Recorder, condition: Condition) -> bool:
    """Pin what makes a comparison come out otherwise; False where nothing is left to do."""
    why = Pin("the code compares this size", "", condition.module, condition.source)
    sides = (condition.left, condition.right)
    named = {attribute for side in sides for attribute in attributes_in(side)}
    own = [label for side in sides for label in _labels_in(side)]
    elsewhere = [
        other.width.label
        for other in recorder.sizes.equations
        if not named.isdisjoint(attributes_in(other.expression))
    ]
    free = [label for label in (*own, *elsewhere) if recorder.algebra.canonical(label) is not None]
    for label in free:
        recorder.algebra.pin(label, why)
    return bool(free)


def _factors(product: Operation) -> tuple[tuple[Expression, Expression], ...]:
    return (product.left, product.right), (product.right, product.left)


def _tie_multiple(recorder: Recorder, equation: Equation) -> bool:
    """Let a width that the code states as a multiple of another one lose the same places of each.

    ``self.ratio * self.key_dim``: the dim is ratio × key_dim, and its columns go with the dim that
    ``key_dim`` governs.
    """
    expression, label = equation.expression, equation.width.label
    if label is None or not isinstance(expression, Operation) or expression.op != "*":
        return False
    why = Pin("a multiple of another size", "", equation.module, equation.source)
    governed = recorder.sizes.governed
    return any(
        _tie_to(recorder.algebra, label, governed(factor), governed(times), why)
        for factor, times in _factors(expression)
    )


def _tie_to(
    algebra: Algebra, label: Label, other: Label | None, number: Label | None, why: Pin
) -> bool:
    """Let a dim lose the places that another does, as many times as it is longer."""
    free = [algebra.canonical(one) for one in (other, number)]
    if other is None or free[0] is None or free[1] is not None or len(label) % len(other):
        return False  # nothing to tie to, or the number of times may change as well
    times, column = algebra.split(label, (len(label) // len(other), len(other)), why)
    if algebra.canonical(times) is None and _alike(algebra, column, other):
        return False  # tied already, and that was not enough
    algebra.pin(times, why)
    algebra.unify(column, other, why)
    return True


def _alike(algebra: Algebra, a: Label | None, b: Label | None) -> bool:
    first, second = algebra.canonical(a), algebra.canonical(b)
    return first is not None and second is not None and np.array_equal(first, second)


def _labels_in(expression: Expression) -> Iterator[Label | None]:
    if isinstance(expression, Width):
        yield expression.label
    elif isinstance(expression, Operation):
        yield from _labels_in(expression.left)
        yield from _labels_in(expression.right)


def in_units(equation: Equation, resolve: Resolve) -> Equation:
    """The equation with its labels in terms of units."""

    width = Width(equation.width.size, resolve(equation.width.label))
    return replace(equation, expression=_convert(equation.expression, resolve), width=width)


def condition_in_units(condition: Condition, resolve: Resolve) -> Condition:
    """The comparison with its labels in terms of units."""
    left, right = (_convert(side, resolve) for side in (condition.left, condition.right))
    return replace(condition, left=left, right=right)


def _convert(expression: Expression, resolve: Resolve) -> Expression:
    if isinstance(expression, Width):
        return Width(expression.size, resolve(expression.label))
    if isinstance(expression, Operation):
        left, right = _convert(expression.left, resolve), _convert(expression.right, resolve)
        return Operation(expression.op, left, right)
    return expression
