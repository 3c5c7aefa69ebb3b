"""After the forward: what is tied or pinned before units are named.

Parameters that the forward never read: an expert that no token visited, a spare head.  The next
input may read them.  Where they stand in a list beside modules of the same class that ran, those
show what they are tied to; elsewhere whatever may be tied to them stays whole.  A model that is
entered by a method instead of its forward is used by that method: what only the forward reads
holds nothing of it.

Sizes that the forward states: whether attributes can follow, and what is tied or pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunus.graph.axis import Label, Mask
from prunus.graph.expressions import (
    Attribute,
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
from prunus.graph.program import refs_in
from prunus.tracer.capture import Recorder
from prunus.tracer.labels import Algebra
from prunus.tracer.units import Resolve, Resolver

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def tie_unread(
    recorder: Recorder,
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    forward_ran: bool = True,
) -> list[str]:
    """Tie what was not read as its siblings are, or pin; returns the names of such parameters.

    Buffers of the same modules are tied along.

    Parameters
    ----------
    state
        The tensors that the recorder knows, by name.
    forward_ran
        Whether the model's own forward was run, and not only a method in its place.
    """
    numbers = {ref.value for node in recorder.nodes for ref in refs_in(node.args)}
    read = {recorder.state[number] for number in recorder.state.keys() & numbers}
    unread = [name for name in state if name not in read and state[name].dim()]
    parameters = [name for name in unread if isinstance(state[name], nn.Parameter)]
    if parameters:
        _Ties(recorder, model, state, read).tie(unread, parameters, forward_ran=forward_ran)
    return parameters


class _Ties:
    """What the tensors that were read show of those that were not."""

    def __init__(
        self, recorder: Recorder, model: nn.Module, state: Mapping[str, Tensor], read: set[str]
    ) -> None:
        self._recorder, self._state, self._read = recorder, state, read
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._ran = {name.rpartition(".")[0] for name in read}

    def tie(self, unread: list[str], parameters: list[str], *, forward_ran: bool) -> None:
        """Tie or pin what was not read."""
        for name in unread:
            if not self.follow(name) and name in parameters:
                self.pin(name, forward_ran=forward_ran)

    def follow(self, name: str) -> bool:
        """Tie a tensor like its siblings'; False if it has none that was read."""
        for prefix, siblings in self._siblings(name):
            algebra = self._recorder.algebra
            own = self._labels(name)
            why = Pin("not read by this run, tied as its siblings are", "", prefix, "")
            for dim, label in enumerate(own):
                theirs = [algebra.canonical(self._labels(one)[dim]) for one in siblings]
                if self._are_shared(siblings, theirs):
                    algebra.unify(label, theirs[0], why)
                else:
                    algebra.pin(label, why)
            return True
        return False

    def pin(self, name: str, *, forward_ran: bool) -> None:
        """Keep whole what a tensor without siblings may be tied to: of its sizes, beside it."""
        path = name.rpartition(".")[0]
        while path and not self._ran_inside(path):
            path = path.rpartition(".")[0]
        if not path and not forward_ran:
            return
        why = Pin(f"{name}, which this run did not read, may be tied to it", "", path, "")
        sizes = {*self._state[name].shape} - {0, 1}
        for one in self._read:
            for label in self._labels(one) if self._is_beside(one, path) else ():
                if label is not None and len(label) in sizes:
                    self._recorder.algebra.pin(label, why)

    def _ran_inside(self, path: str) -> bool:
        return any(f"{one}.".startswith(f"{path}.") for one in self._ran)

    def _is_beside(self, name: str, path: str) -> bool:
        """Whether a tensor is the module's own, or that of a layer which is its child."""
        owner = name.rpartition(".")[0]
        return owner == path or (owner.rpartition(".")[0] == path and owner != path)

    def _labels(self, name: str) -> tuple[Label | None, ...]:
        number = self._recorder.value_of(self._state[name])
        return self._recorder.labels[number]

    def _siblings(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Tensors at the same place of modules of one class in one list, innermost list first."""
        parts = name.split(".")
        for at in range(len(parts) - 2, -1, -1):
            path, key, rest = ".".join(parts[:at]), parts[at], parts[at + 1 :]
            container = self._modules.get(path)
            if not isinstance(container, _CONTAINERS) or key not in container._modules:
                continue
            found = self._alike(name, container._modules, at) if rest else []
            if found:
                yield ".".join(parts[: at + 1]), found

    def _alike(self, name: str, modules: Mapping[str, Any], at: int) -> list[str]:
        """The tensors that were read whose names differ in the module of a list alone."""
        parts, shape = name.split("."), self._state[name].shape
        kind = type(modules[parts[at]])
        keys = [key for key, module in modules.items() if type(module) is kind]
        others = (".".join([*parts[:at], key, *parts[at + 1 :]]) for key in keys)
        return [o for o in others if o in self._read and self._state[o].shape == shape]

    def _are_shared(self, siblings: list[str], labels: list[Label | None]) -> bool:
        """Whether a dim of all siblings is one and the same, as that of a residual stream is."""
        first = labels[0]
        if first is None:
            return False
        if len(labels) > 1:
            return all(
                label is not None and label.shape == first.shape and (label == first).all()
                for label in labels
            )
        return any(
            np.isin(first, canonical).all()
            for name in self._read
            if not self._is_part(name, siblings[0])
            for label in self._labels(name)
            if (canonical := self._recorder.algebra.canonical(label)) is not None
        )

    def _is_part(self, name: str, sibling: str) -> bool:
        """Whether a tensor is inside the same child of a list as a sibling's."""
        parts, others = name.split("."), sibling.split(".")
        for at in range(len(others) - 1, 0, -1):
            if isinstance(self._modules.get(".".join(others[: at - 1])), _CONTAINERS):
                return parts[:at] == others[:at]
        return False


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
    elsewhere = _governed_by(recorder, named)
    for labels in (own, elsewhere):
        free = [one for one in labels if algebra.canonical(one) is not None]
        for one in free:
            algebra.pin(one, why)
        if free:
            return True
    return False


def _governed_by(recorder: Recorder, named: Set[Attribute]) -> list[Label | None]:
    """Labels of the widths that are computed from one of these attributes."""
    return [
        other.width.label
        for other in recorder.sizes.equations
        if not named.isdisjoint(attributes_in(other.expression))
    ]


def _keep_path(recorder: Recorder, condition: Condition) -> bool:
    """Pin what makes a comparison come out otherwise; False where nothing is left to do."""
    why = Pin("the code compares this size", "", condition.module, condition.source)
    sides = (condition.left, condition.right)
    named = {attribute for side in sides for attribute in attributes_in(side)}
    own = [label for side in sides for label in _labels_in(side)]
    elsewhere = _governed_by(recorder, named)
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
    if algebra.canonical(times) is None and _same_units(algebra, column, other):
        return False  # tied already, and that was not enough
    algebra.pin(times, why)
    algebra.unify(column, other, why)
    return True


def _same_units(algebra: Algebra, a: Label | None, b: Label | None) -> bool:
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
