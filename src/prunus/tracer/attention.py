"""Attention in a traced program: which units are heads, and which are dims of them.

An attention is softmax(q kᵀ) v, fused in one operator or written out.  Where it is written out, it
is found from its softmax: backwards lies the product of two activations that makes the scores,
forwards the one that weighs the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label
from prunus.graph.program import Node, Program, Ref, refs_in

Units = NDArray[np.int64]

_PRODUCTS = frozenset({"bmm", "baddbmm", "matmul", "mm"})
_SOFTMAXES = frozenset({"_softmax", "softmax", "_safe_softmax"})
_SHIFTING = frozenset({
    "add", "sub", "masked_fill", "where", "_to_copy", "to", "view", "_unsafe_view", "expand",
    "clone", "alias", "detach", "unsqueeze", "squeeze",
})  # fmt: skip
_FAR = 40
"""Operators between a softmax and its products, at most: scales, masks, biases, casts, views."""


@dataclass(frozen=True, eq=False)
class Core:
    """One attention that ran.

    Attributes
    ----------
    module
        Path of the module that ran it.
    queries, keys
        For each query head the units that have to stay for it to stay, shape ``(heads, columns)``,
        and those of them that keys and values are made of; 0 stands for what always stays.
    scores, values
        Units in the dims of queries and keys, and in those of values.
    """

    module: str
    queries: Label
    keys: Label
    scores: Units
    values: Units


def find_cores(program: Program) -> Iterator[Core]:
    """Every attention of a program, in the order in which they ran."""
    flow = _Flow(program)
    for node, scores, values in _attentions(flow):
        if values is node:
            yield _fused(flow, node)
        elif scores and values is not None:
            yield _written_out(flow, node, scores, values)


def _attentions(flow: _Flow) -> Iterator[tuple[Node, Sequence[Node], Node | None]]:
    """Every softmax with the products that make its scores, and the one that weighs values.

    A fused attention is all of these in one.
    """
    for index, node in enumerate(flow.program.nodes):
        name = _name(node)
        if name.startswith("_scaled_dot_product"):
            yield node, [node], node
        elif name in _SOFTMAXES:
            yield node, flow.products_before(index), flow.product_after(index)


class Scores(NamedTuple):
    """A product q kᵀ of which a softmax over the keys is taken.

    Attributes
    ----------
    queries, keys
        What is multiplied; the dims that are summed over are ``dims`` of theirs.
    shiftless
        Whether it is the same to the softmax if all scores of a query grow by one number.
    """

    node: Node
    queries: Ref
    keys: Ref
    dims: tuple[int, int]
    shiftless: bool


def find_scores(program: Program) -> Iterator[Scores]:
    """Every product of queries and keys of a program."""
    flow = _Flow(program)
    for node, scores, values in _attentions(flow):
        if values is node:
            yield Scores(node, node.args["query"], node.args["key"], (-1, -1), shiftless=True)
        elif node.args["dim"] in (-1, len(program.shapes[node.args["self"].value]) - 1):
            for product in scores:
                alike = flow.only_shifts_between(product, node)
                yield Scores(product, *_operands(product), (-1, -2), shiftless=alike)


class Weighing(NamedTuple):
    """A product of attention probabilities with values, whose last dims are those of the heads."""

    node: Node
    values: Ref


def find_weighings(program: Program) -> Iterator[Weighing]:
    """Every product of probabilities with values of a program."""
    for node, _, values in _attentions(_Flow(program)):
        if values is node:
            yield Weighing(node, node.args["value"])
        elif values is not None:
            yield Weighing(values, _operands(values)[1])


def _fused(flow: _Flow, node: Node) -> Core:
    program = flow.program
    query, key, value = (node.args[name] for name in ("query", "key", "value"))
    queries = _heads(program, query)
    return Core(
        node.module,
        queries,
        _made_of(queries, flow.units_behind(value)),
        _units(program.value_label(query, -1), program.value_label(key, -1)),
        _units(program.value_label(value, -1)),
    )


def _written_out(flow: _Flow, node: Node, scores: Sequence[Node], values: Node) -> Core:
    program = flow.program
    pairs = [_operands(product) for product in scores]
    weights, value = _operands(values)
    queries = _heads(program, node.args.get("self", weights))
    return Core(
        values.module,
        queries,
        _made_of(queries, flow.units_behind(value)),
        _units(*(program.value_label(a, -1) for a, _ in pairs)),
        _units(program.value_label(value, -1)),
    )


def _made_of(heads: Label, units: Units) -> Label:
    return np.where(np.isin(heads, units), heads, 0)


def _operands(product: Node) -> tuple[Any, Any]:
    names = ("batch1", "batch2") if "batch1" in product.args else ("self", "mat2")
    return product.args[names[0]], product.args.get(names[1], product.args.get("other"))


def _heads(program: Program, value: Any) -> Label:
    """Units of every head: along the last labelled dim before those of sequence and features.

    A batched product has batch and heads in one dim; then each head stands there once per sample.
    """
    dims = len(program.shapes[value.value])
    for dim in range(dims - 3, -1, -1):
        label = program.value_label(value, dim)
        if label is not None and (label > 0).any():
            _, first = np.unique(label, axis=0, return_index=True)
            distinct = label[np.sort(first)]
            return distinct if len(label) % len(distinct) == 0 and _repeats(label) else label
    return np.zeros((0, 1), dtype=np.int64)


def _repeats(label: Label) -> bool:
    """Whether a label is one pattern over and over, as many samples lie in one dim."""
    count = len(np.unique(label, axis=0))
    return bool((label.reshape(-1, count, label.shape[1]) == label[:count]).all())


def _units(*labels: Label | None) -> Units:
    found = [np.unique(label) for label in labels if label is not None]
    return np.setdiff1d(np.concatenate(found), [0]) if found else np.zeros(0, dtype=np.int64)


def _name(node: Node) -> str:
    return str(node.target._schema.name).partition("::")[2]


class _Flow:
    """Who made a value, and who reads it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nodes = program.nodes
        self._fixed = {*program.state, *program.constants}
        self._maker = {value: n for n, node in enumerate(self._nodes) for value in node.outputs}
        self._readers: dict[int, list[int]] = {}
        for n, node in enumerate(self._nodes):
            for value in _read(node):
                self._readers.setdefault(value, []).append(n)

    def products_before(self, index: int) -> list[Node]:
        """Products of two activations from which a softmax comes without another in between."""
        found: dict[int, Node] = {}
        queue, seen = [index], {index}
        while queue and len(seen) < _FAR:
            for value in _read(self._nodes[queue.pop(0)]):
                maker = self._maker.get(value)
                if maker is None or maker in seen:
                    continue
                seen.add(maker)
                node = self._nodes[maker]
                if self._multiplies(node):
                    found[maker] = node
                elif not _contracts(node):
                    queue.append(maker)
        return [found[n] for n in sorted(found)]

    def product_after(self, index: int) -> Node | None:
        """The first product of two activations that reads what a softmax gave."""
        queue, seen = [index], {index}
        while queue and len(seen) < _FAR:
            for value in self._nodes[queue.pop(0)].outputs:
                for reader in self._readers.get(value, ()):
                    node = self._nodes[reader]
                    if self._multiplies(node):
                        return node
                    if reader not in seen and not _contracts(node):
                        seen.add(reader)
                        queue.append(reader)
        return None

    def only_shifts_between(self, product: Node, softmax: Node) -> bool:
        """Whether one number more for all scores of a query is one number more at the softmax, or
        a multiple of it: scales and masks lie between, and nothing that is not linear."""
        node = product
        while node is not softmax:
            (value, *more) = node.outputs
            readers = self._readers.get(value, [])
            if more or len(readers) != 1:
                return False
            node = self._nodes[readers[0]]
            if node is not softmax and not self._shifts(node, value):
                return False
        return True

    def _shifts(self, node: Node, scores: int) -> bool:
        if _name(node).rstrip("_") not in ("mul", "div"):
            return _name(node).rstrip("_") in _SHIFTING
        others = [shape for n in _read(node) if n != scores for shape in [self.program.shapes[n]]]
        return all(not shape or shape[-1] == 1 for shape in others)

    def units_behind(self, value: Any) -> Units:
        """Units of what a value was made of, before anything repeated it."""
        queue, seen = [value.value], {value.value}
        found: list[Label | None] = []
        while queue and len(seen) < _FAR:
            number = queue.pop(0)
            maker = self._maker.get(number)
            node = None if maker is None else self._nodes[maker]
            if node is None or _contracts(node):
                dims = range(len(self.program.shapes[number]))
                found += [self.program.value_label(Ref(number), dim) for dim in dims]
                continue
            fresh = [n for n in _read(node) if n not in seen]
            seen.update(fresh)
            queue += fresh
        return _units(*found)

    def _multiplies(self, node: Node) -> bool:
        if _name(node) not in _PRODUCTS:
            return False
        return all(isinstance(o, Ref) and not self._is_fixed(o.value) for o in _operands(node))

    def _is_fixed(self, value: int) -> bool:
        """Whether a value is a weight, or a view of one."""
        while value not in self._fixed:
            maker = self._maker.get(value)
            read = [] if maker is None else _read(self._nodes[maker])
            if len(read) != 1:
                return False
            value = read[0]
        return True


def _contracts(node: Node) -> bool:
    return node.effect is not None and bool(node.effect.contracted)


def _read(node: Node) -> list[int]:
    """Numbers of the values that an operator reads."""
    return [ref.value for ref in refs_in(node.args)]
