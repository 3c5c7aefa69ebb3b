"""Which weights make the queries, keys and values of an attention, and read its answer, row by row.

Between a projection and a product lie views and transpositions, and perhaps a constant factor.
They are run once more on the numbers of the projection's outputs: what arrives at the product says
which output is which dim of which head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.graph.axis import Axis, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import Node, Ref
from prunus.tracer.attention import Scores, Weighing, find_scores, find_weighings
from prunus.tracer.dataflow import Dataflow, contracts, name_of
from prunus.tracer.registry import call_bound

_MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "select",
    "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze",
    "expand", "unflatten", "clone", "contiguous", "alias", "detach",
})  # fmt: skip
"""Operators that give the values that they were given, in another order."""

_CASTS = frozenset({"_to_copy", "to"})
_FACTORS = frozenset({"mul", "mul_", "div", "div_"})


@dataclass(frozen=True, eq=False)
class Projection:
    """A weight whose outputs are queries or keys.

    Attributes
    ----------
    weight, bias
        Names of its tensors; the bias is empty where there is none.
    dim
        Of the weight: that of its outputs.
    rows
        For every head, which of the outputs are its dims, shape ``(heads, dims)``.
    """

    weight: str
    bias: str
    dim: int
    rows: Tensor


@dataclass(frozen=True, eq=False)
class ScoreProduct:
    """Queries times keys.

    Attributes
    ----------
    queries, keys
        What makes them.
    shared
        For every head of the keys, the heads of the queries that are multiplied with it.
    shiftless
        See :class:`~prunus.tracer.attention.Scores`.
    """

    queries: Projection
    keys: Projection
    shared: tuple[tuple[int, ...], ...]
    shiftless: bool

    @property
    def name(self) -> str:
        """What a report calls it."""
        names = dict.fromkeys([self.queries.weight, self.keys.weight])
        return " · ".join(names)

    @property
    def outputs(self) -> list[tuple[str, int]]:
        """Every output of a weight that it takes."""
        sides = (self.queries, self.keys)
        return [(side.weight, row) for side in sides for row in side.rows.flatten().tolist()]


@dataclass(frozen=True, eq=False)
class ValuePath:
    """Values on their way to the weight that reads what attention makes of them.

    Attributes
    ----------
    values
        What makes them.
    weight, dim
        Name of the weight that reads the answer, and its dim that is summed over.
    columns
        For every head of the values, where the weight reads its dims, shape ``(heads, readers,
        dims)``: several times, where heads of queries share one of values.
    """

    values: Projection
    weight: str
    dim: int
    columns: Tensor


class _UnknownError(Exception):
    """Why a product can't be followed."""


def find_products(
    graph: CouplingGraph, kept: Mask | None = None
) -> tuple[list[ScoreProduct], dict[str, str]]:
    """Every product of queries and keys whose rows are known; and why others are not, by module.

    Of the others only those that lose dims, where it is said which units are ``kept``.
    """
    search = _Search(graph.program)
    found: list[ScoreProduct] = []
    unknown: dict[str, str] = {}
    for scores in find_scores(graph.program):
        try:
            found.append(search.product(scores))
        except _UnknownError as error:
            if kept is None or _lose_dims(graph, scores, kept):
                unknown[scores.node.module or "the model"] = str(error)
    alone = _alone(found)
    several = [product.name for product in found if product not in alone]
    return alone, unknown | dict.fromkeys(several, "its weights make several products")


def _lose_dims(graph: CouplingGraph, scores: Scores, kept: Mask) -> bool:
    label = graph.program.value_label(scores.keys, scores.dims[1])
    return label is not None and not kept[label].all()


def _alone(products: Sequence[ScoreProduct]) -> list[ScoreProduct]:
    """Products whose outputs no other one takes."""
    taken = Counter(output for product in products for output in product.outputs)
    return [product for product in products if max(taken[one] for one in product.outputs) == 1]


def find_values(graph: CouplingGraph) -> list[ValuePath]:
    """The values of every attention between projection and answer, where both are known."""
    search = _Search(graph.program)
    found: list[ValuePath] = []
    for weighing in find_weighings(graph.program):
        with suppress(_UnknownError):
            found.append(search.value_path(weighing))
    weights = [name for path in found for name in {path.values.weight, path.weight}]
    return [p for p in found if weights.count(p.values.weight) == weights.count(p.weight) == 1]


class _Search(Dataflow):
    """Follows values of one program back to the weights that made them."""

    def product(self, scores: Scores) -> ScoreProduct:
        """The weights behind both sides, and which heads meet."""
        (queries, q), (keys, k) = (
            self._follow(ref, dim)
            for ref, dim in zip((scores.queries, scores.keys), scores.dims, strict=True)
        )
        if q.dim() > 2 and k.dim() > 2 and q.shape[-2] > k.shape[-2]:  # queries that share keys
            k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
        if q.shape != k.shape:
            raise _UnknownError("queries and keys have other shapes")
        width = q.shape[-1]
        pairs = torch.cat([q.reshape(-1, width), k.reshape(-1, width)], 1).unique(dim=0)
        first, q_of = pairs[:, :width].unique(dim=0, return_inverse=True)
        second, k_of = pairs[:, width:].unique(dim=0, return_inverse=True)
        _check_apart(first)
        _check_apart(second)
        if len(pairs) > len(first):
            raise _UnknownError("a head of queries meets several heads of keys")
        shared: list[list[int]] = [[] for _ in second]
        for query, key in zip(q_of.tolist(), k_of.tolist(), strict=True):
            shared[key].append(query)
        return ScoreProduct(
            Projection(*queries, first),
            Projection(*keys, second),
            tuple(map(tuple, shared)),
            scores.shiftless,
        )

    def value_path(self, weighing: Weighing) -> ValuePath:
        """The weight behind the values, and the one that reads the answer."""
        projection, rows = self._follow(weighing.values, -1)
        (out, *_) = weighing.node.outputs
        shape = self.program.shapes[out]
        if len(shape) > 3 and rows.shape[-2] < shape[-3]:  # queries that share values
            rows = rows.repeat_interleave(shape[-3] // rows.shape[-2], -2)
        if (*rows.shape[:-1], rows.shape[-1]) != (*shape[:-2], shape[-1]):
            raise _UnknownError("the answer has another shape than values")
        heads = rows.reshape(-1, rows.shape[-1]).unique(dim=0)
        _check_apart(heads)
        weight, dim, read = self._follow_on(out, rows.unsqueeze(-2).expand(shape))
        columns = [(read == row).nonzero()[:, 0] for row in heads.flatten()]
        readers = {len(found) for found in columns}
        if len(readers) != 1 or 0 in readers:
            raise _UnknownError("dims of one head are read more often than others")
        by_dim = torch.stack(columns).view(*heads.shape, -1)
        return ValuePath(Projection(*projection, heads), weight, dim, by_dim.mT.contiguous())

    def _follow_on(self, value: int, numbers: Tensor) -> tuple[str, int, Tensor]:
        """The weight that alone reads a value, its dim, and the numbers that its columns read."""
        while True:
            readers = self.readers.get(value, [])
            if len(readers) != 1 or value in self.program.outputs.values():
                raise _UnknownError("the answer is read by more than one weight")
            node = readers[0]
            if contracts(node):
                break
            if not self._keeps_values(node) or len(node.outputs) != 1:
                raise _UnknownError(f"{name_of(node)} reads the answer")
            (numbers,), (value,) = _move(node, numbers), node.outputs
        weight, _, dim = self._weight_of(node)
        first = node.args["mat1" if name_of(node) == "addmm" else "self"]
        if first.value != value or not bool((numbers == numbers[:1]).all()):
            raise _UnknownError("tokens are read in different ways")
        return weight, 1 - dim, numbers[0]

    def _follow(self, ref: Ref, dim: int) -> tuple[tuple[str, str, int], Tensor]:
        """The weight, bias and dim behind a value, and the numbers of its outputs.

        The numbers have the shape ``(…, dims)`` of one token.
        """
        value, moves = ref.value, []
        while True:
            node = self.maker.get(value)
            if node is None:
                raise _UnknownError("it is no output of a linear layer")
            if contracts(node):
                break
            if not self._keeps_values(node):
                raise _UnknownError(f"{name_of(node)} lies between its projection and its product")
            moves.append((node, node.outputs.index(value)))
            value = node.args["self"].value
        numbers = torch.arange(self.program.shapes[value][-1])
        numbers = numbers.expand(self.program.shapes[value])
        passed = []
        for move, place in reversed(moves):
            passed.append((value, numbers, move))
            numbers, value = _move(move, numbers)[place], move.outputs[place]
        for one in passed:
            self._check_alone(*one, numbers)
        if len(self.readers[value]) > 1:
            raise _UnknownError("queries or keys are read elsewhere as well")
        numbers = numbers.movedim(dim, -1)
        if not bool((numbers == numbers[..., :1, :]).all()):
            raise _UnknownError("its tokens are made of different outputs")
        return self._weight_of(node), numbers[..., 0, :]

    def _check_alone(self, value: int, numbers: Tensor, move: Node, wanted: Tensor) -> None:
        """Refuse a value of which something else reads the outputs that are wanted."""
        for reader in self.readers[value]:
            if reader is move:
                continue
            moved = _move(reader, numbers) if self._keeps_values(reader) else [numbers]
            if any(bool(torch.isin(wanted, one).any()) for one in moved):
                raise _UnknownError(f"{name_of(reader)} reads its projection as well")

    def _keeps_values(self, node: Node) -> bool:
        name = name_of(node)
        if name in _FACTORS:
            other = node.args.get("other")
            return not isinstance(other, Ref) or self.program.shapes[other.value] == ()
        return name in _MOVES or name in _CASTS

    def _weight_of(self, node: Node) -> tuple[str, str, int]:
        """Names of the weight and bias of a matrix product, and the weight's dim of outputs."""
        name = name_of(node)
        if name not in ("addmm", "mm"):
            raise _UnknownError(f"it is made by {name}")
        matrix = node.args["mat2"].value
        read = [matrix, node.args["self"].value] if name == "addmm" else [matrix]
        weight, *biases = names = [self.names.get(value, "") for value in read]
        if "" in names or not node.args.get("alpha", 1) == node.args.get("beta", 1) == 1:
            raise _UnknownError("it is no plain linear layer")
        if [self.uses(one) for one in names] != [[node]] * len(names):
            raise _UnknownError(f"{weight} is read more than once")
        stored = matrix in self.program.state
        if not stored and name_of(self.maker[matrix]) not in ("t", "transpose"):
            raise _UnknownError(f"{weight} is read in parts")
        return weight, "".join(biases), int(stored)


def _check_apart(heads: Tensor) -> None:
    if len(heads.unique()) < heads.numel():
        raise _UnknownError("an output is a dim of several heads")


def _move(node: Node, numbers: Tensor) -> Sequence[Tensor]:
    """What an operator that moves values makes of their numbers, output by output."""
    name = name_of(node)
    if name in _CASTS or name in _FACTORS:
        return [numbers]
    bound: dict[str, Any] = {**node.args, "self": numbers}
    if name in ("view", "_unsafe_view"):
        return [numbers.reshape(bound["size"])]
    out = call_bound(node.target, bound)
    return out if isinstance(out, (list, tuple)) else [out]


def stays(rows: Tensor, plan: Plan, tensor: str, dim: int) -> Tensor:
    """Whether each of those positions of a dim is kept; shape of ``rows``."""
    kept = plan.keep.get(Axis(tensor, dim))
    return (
        torch.ones_like(rows, dtype=torch.bool)
        if kept is None
        else torch.isin(rows, torch.as_tensor(kept))
    )


def pairs_of(product: ScoreProduct) -> Iterator[tuple[Tensor, Tensor]]:
    """For every head of the keys the rows of its queries, ``(heads, d)``, and its own, ``(d,)``."""
    for key, queries in enumerate(product.shared):
        yield product.queries.rows[list(queries)], product.keys.rows[key]
