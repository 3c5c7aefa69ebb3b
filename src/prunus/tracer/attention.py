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
from prunus.graph.program import Node, Program, Ref
from prunus.tracer.dataflow import Dataflow, contracts, name_of, read_by

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
        if scores and values is not None:
            yield _core(flow, node, scores, values)


def _attentions(flow: _Flow) -> Iterator[tuple[Node, Sequence[Node], Node | None]]:
    """Every softmax with the products that make its scores, and the one that weighs values.

    A fused attention is all of these in one.
    """
    for node in flow.program.nodes:
        name = name_of(node)
        if name.startswith("_scaled_dot_product"):
            yield node, [node], node
        elif name in _SOFTMAXES:
            yield node, flow.products_before(node), flow.product_after(node)


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


def score_weights(program: Program) -> frozenset[str]:
    """The weights that queries and keys are made by."""
    flow = _Flow(program)
    made = {product.node: product.name for _, _, product in flow.products() if product is not None}
    read = {ref.value for one in find_scores(program) for ref in (one.queries, one.keys)}
    sources = {number for value in read for number in flow.sources(value)} & flow.maker.keys()
    return frozenset(filter(None, (made.get(flow.maker[number], "") for number in sources)))


def find_queries(program: Program) -> Iterator[tuple[Node, Ref]]:
    """Every fused attention and every softmax of an attention, with the queries behind it."""
    for node, scores, values in _attentions(_Flow(program)):
        for product in scores[:1]:
            yield node, node.args["query"] if values is node else _operands(product)[0]


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


def _core(flow: _Flow, node: Node, scores: Sequence[Node], values: Node) -> Core:
    label = flow.program.value_label
    if values is node:
        pairs, value = [(node.args["query"], node.args["key"])], node.args["value"]
    else:
        pairs, (_, value) = list(map(_operands, scores)), _operands(values)
    queries = _heads(flow.program, node.args["query" if values is node else "self"])
    return Core(
        values.module,
        queries,
        _made_of(queries, flow.units_behind(value)),
        _units(*(label(query, -1) for query, _ in pairs)),
        _units(label(value, -1)),
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


class _Flow(Dataflow):
    """Looks for the products of an attention."""

    def products_before(self, softmax: Node) -> list[Node]:
        """Products of two activations from which a softmax comes without another in between."""
        ends = (self.maker.get(n) for value in read_by(softmax) for n in self.sources(value))
        found = {node for node in ends if node is not None and self._multiplies(node)}
        return sorted(found, key=self.place.__getitem__)

    def product_after(self, softmax: Node) -> Node | None:
        """The first product of two activations that reads what a softmax gave."""
        queue, seen = [softmax], {softmax}
        while queue and len(seen) < _FAR:
            for value in queue.pop(0).outputs:
                for node in self.readers.get(value, ()):
                    if self._multiplies(node):
                        return node
                    if node not in seen and not contracts(node):
                        seen.add(node)
                        queue.append(node)
        return None

    def only_shifts_between(self, product: Node, softmax: Node) -> bool:
        """Whether one number more for all scores of a query is one number more at the softmax, or
        a multiple of it: scales and masks lie between, and nothing that is not linear."""
        node = product
        while node is not softmax:
            (value, *more) = node.outputs
            readers = self.readers.get(value, [])
            if more or len(readers) != 1:
                return False
            node = readers[0]
            if node is not softmax and not self._shifts(node, value):
                return False
        return True

    def _shifts(self, node: Node, scores: int) -> bool:
        if name_of(node).rstrip("_") not in ("mul", "div"):
            return name_of(node).rstrip("_") in _SHIFTING
        if read_by(node).count(scores) > 1:  # a square
            return False
        others = [shape for n in read_by(node) if n != scores for shape in [self.program.shapes[n]]]
        return all(not shape or shape[-1] == 1 for shape in others)

    def units_behind(self, value: Any) -> Units:
        """Units of what a value was made of, before anything repeated it."""
        label, shapes = self.program.value_label, self.program.shapes
        sources = self.sources(value.value)
        return _units(*(label(Ref(n), dim) for n in sources for dim in range(len(shapes[n]))))

    def sources(self, value: int) -> list[int]:
        """What a value was made of: the outputs of products before it, and what nothing made."""
        queue, seen = [value], {value}
        found: list[int] = []
        while queue and len(seen) < _FAR:
            number = queue.pop(0)
            node = self.maker.get(number)
            if node is None or contracts(node):
                found.append(number)
                continue
            fresh = [n for n in read_by(node) if n not in seen]
            seen.update(fresh)
            queue += fresh
        return found

    def _multiplies(self, node: Node) -> bool:
        if name_of(node) not in _PRODUCTS:
            return False
        return all(isinstance(o, Ref) and o.value not in self.stored for o in _operands(node))
