"""Where the softmax scale of a fused attention can be kept when its head dim shrinks.

``scaled_dot_product_attention`` without ``scale=`` divides by the square root of the head dim
that it sees.  To keep the original scale, the query is multiplied by √(new / old): folded into
the weights that compute it, which are found by walking back through linear operators.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prunus.graph.groups import Pin
from prunus.graph.program import Node, Program, Ref
from prunus.tracer.attention import find_queries
from prunus.tracer.dataflow import Dataflow, name_of
from prunus.tracer.registry import call_bound

Targets = dict[tuple[str, int], set[int]]
"""(tensor, dim) → positions to be multiplied."""

Fixed = tuple[tuple[str, int, tuple[int, ...]], ...]
"""The same as a constant: (tensor, dim, positions)."""

NORMS = {"native_layer_norm": -1, "_fused_rms_norm": -1, "native_batch_norm": 1,
         "_native_batch_norm_legit_no_training": 1, "cudnn_batch_norm": 1}  # fmt: skip
"""Norms, linear in their weight and bias, with the dim along which these lie."""


@dataclass(frozen=True)
class Attention:
    """An attention with the default scale.

    Attributes
    ----------
    query
        Value number of the query.
    alone
        Whether the query is none of the other operands as well.
    nodes
        Positions of the operators: a fused one and what surrounds it, or those into which
        PyTorch took the attention apart.
    why
        Where it ran.
    """

    query: int
    alone: bool
    nodes: range
    why: Pin


Columns = list[tuple[str, int, Tensor]]
"""Of every weight that a value is linear in: its name, a dim, and which position stands where."""

_SOURCES: dict[str, tuple[int, tuple[tuple[str, int], ...]]] = {
    "mm": (-1, (("mat2", 1),)),
    "addmm": (-1, (("mat2", 1), ("self", 0))),
    "convolution": (1, (("weight", 0), ("bias", 0))),
    **{name: (dim, (("weight", 0), ("bias", 0))) for name, dim in NORMS.items()},
}
"""Operators of a weight: the dim that its rows make, and the arguments with the dim of the rows."""

_VIEWS = {
    "view", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
    "select", "slice", "split", "split_with_sizes", "unbind", "cat", "stack", "clone",
    "contiguous", "alias", "detach", "unsafe_split", "chunk",
}  # fmt: skip
_SAME = {"mul", "neg", "_to_copy", "add", "sub", "mul_", "add_", "div"}
_SUMS = {"add", "add_", "sub"}
_FACTORS = {"mul", "mul_", "div"}
_NOWHERE = torch.tensor(-1)


class Fold:
    """Finds the weights that a query is linear in."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._maker = flow.maker
        self._state, self._shapes = flow.program.state, flow.program.shapes
        self._met: set[int] = set()

    def targets(self, query: int) -> Targets | None:
        """What to multiply so that the query is multiplied; None if it isn't linear in weights."""
        columns = self._columns(query)
        if columns is None:
            return None
        found: Targets = {}
        for name, dim, positions in columns:
            found.setdefault((name, dim), set()).update(_present(positions))
        return found

    def serves_only(self, attentions: Sequence[Attention], fixed: Fixed) -> bool:
        """Whether what is multiplied reaches nothing but the queries of these attentions.

        A query may also make an attention bias, and one projection both queries and keys.
        """
        if not all(attention.alone for attention in attentions):
            return False
        queries = {attention.query for attention in attentions}
        inside = frozenset(chain.from_iterable(attention.nodes for attention in attentions))
        self._met.clear()
        for query in queries:
            self._columns(query)
        targets = {(name, dim): set(at) for name, dim, at in fixed}
        path = frozenset(self._met)
        return not any(
            self._leaves(value, path, targets, inside if value in queries else ())
            for value in self._starts(fixed) | path
        )

    def _starts(self, fixed: Fixed) -> set[int]:
        names = {name for name, _, _ in fixed}
        return {value for value, name in self._state.items() if name in names}

    def _leaves(
        self, value: int, path: frozenset[int], targets: Targets, skipped: Container[int]
    ) -> bool:
        """Whether any other reader of a value brings what is multiplied off the path."""
        for node in self._flow.readers.get(value, ()):
            if self._flow.place[node] in skipped:
                continue
            if name_of(node) in _FACTORS and len(path.intersection(self._flow.reads[node])) > 1:
                return True
            others = (out for out in node.outputs if out not in path)
            if any(self._reaches(value, node, out, targets) for out in others):
                return True
        return False

    def _reaches(self, value: int, node: Node, out: int, targets: Targets) -> bool:
        """Whether what is multiplied stands somewhere in an output of a reader of a value."""
        if name_of(node) in NORMS and value != node.args["input"].value:
            return out == node.outputs[0]
        if name_of(node) not in (_VIEWS | _SAME) - _FACTORS:
            return True
        columns = self._columns(out)
        return columns is None or any(
            not targets.get((name, dim), set()).isdisjoint(_present(positions))
            for name, dim, positions in columns
        )

    def _columns(self, value: int) -> Columns | None:
        """For every weight that the value is linear in: which of its positions stands where."""
        found = self._find_columns(value)
        if found is not None:
            self._met.add(value)
        return found

    def _find_columns(self, value: int) -> Columns | None:
        node = self._maker.get(value)
        if node is None:
            return None
        name = name_of(node)
        if name in _SOURCES:
            return self._source(node, value)
        if name in _FACTORS:
            return self._product(node, value)
        return self._carried(node, value) if name in _VIEWS | _SAME else None

    def _carried(self, node: Node, value: int) -> Columns | None:
        """Of an operator that rearranges, or adds up, what goes in."""
        carried: list[Columns] = []
        for read in self._flow.reads[node]:
            columns = self._columns(read)
            if columns is None and name_of(node) in _SUMS:
                columns = self._parameter(read)
            if columns is None:
                return None
            carried.append(columns)
        if name_of(node) in _VIEWS:
            return self._viewed(node, value, carried)
        shape = self._shapes[value]
        return [(w, d, index.expand(shape)) for part in carried for w, d, index in part]

    def _product(self, node: Node, value: int) -> Columns | None:
        """One factor is enough: a parameter if there is one, else whichever is linear."""
        read = self._flow.reads[node]
        if len(set(read)) < len(read):
            return None
        for one in read[:1] if name_of(node) == "div" else read:
            columns = self._parameter(one) or self._columns(one)
            if columns is not None:
                return [(w, d, index.expand(self._shapes[value])) for w, d, index in columns]
        return None

    def _parameter(self, value: int) -> Columns | None:
        """A vector of state as a factor: all of its positions, aligned to the right."""
        name, shape = self._state.get(value), self._shapes[value]
        if name is None or len(shape) != 1:
            return None
        self._met.add(value)
        return [(name, 0, torch.arange(shape[0]))]

    def _source(self, node: Node, value: int) -> Columns | None:
        """A weight whose rows make one dim of the value."""
        dim, named = _SOURCES[name_of(node)]
        shape = self._shapes[value]
        if value != node.outputs[0] or node.args.get("transposed"):
            return None
        dim %= len(shape)
        index = torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        found: Columns = []
        for argument, axis in named:
            reference = node.args.get(argument)
            if reference is None:
                continue
            tensor = self._tensor(reference, axis) if isinstance(reference, Ref) else None
            if tensor is None:
                return None
            found.append((*tensor, index.expand(shape)))
        return found or None

    def _tensor(self, reference: Ref, dim: int) -> tuple[str, int] | None:
        """The state behind an operand, seen through transpositions."""
        value = reference.value
        self._met.add(value)
        while value not in self._state:
            node = self._maker.get(value)
            name = "" if node is None else name_of(node)
            if node is None or name not in ("t", "detach", "alias", "_to_copy"):
                return None
            dim = 1 - dim if name == "t" else dim
            value = node.args["self"].value
            self._met.add(value)
        return self._state[value], dim

    def _viewed(self, node: Node, value: int, carried: list[Columns]) -> Columns:
        """Run the same rearrangement on the positions."""
        result = []
        longest = max(len(part) for part in carried)
        for turn in range(longest):
            parts = [part[min(turn, len(part) - 1)] for part in carried]
            keys = list(dict.fromkeys((w, d) for w, d, _ in parts))
            for weight, dim in keys:
                given = [
                    index if (w, d) == (weight, dim) else _NOWHERE.expand(index.shape)
                    for w, d, index in parts
                ]
                out = _rearrange(node, given)
                out = out[node.outputs.index(value)] if isinstance(out, (list, tuple)) else out
                result.append((weight, dim, out))
        return result


def find_rescales(
    flow: Dataflow, attended: Sequence[Attention] = ()
) -> Iterator[tuple[Attention, Fixed | None]]:
    """Attentions with the default scale, and what to multiply in their stead.

    Parameters
    ----------
    attended
        Those that the forward itself asked for.  PyTorch may take them apart, or state the scale.

    Returns
    -------
    iterator
        None stands for a query that is not linear in weights, or whose weights have other uses.
    """
    fold = Fold(flow)
    known = frozenset(chain.from_iterable(attention.nodes for attention in attended))
    own = [one for one in _unscaled(flow) if one.nodes.start not in known]
    alike: dict[Fixed | None, list[Attention]] = {}
    for attention in (*attended, *own):
        targets = fold.targets(attention.query)
        alike.setdefault(None if targets is None else _fix(targets), []).append(attention)
    for fixed, found in alike.items():
        fits = fixed is not None and fold.serves_only(found, fixed)
        yield from ((attention, fixed if fits else None) for attention in found)


def _unscaled(flow: Dataflow) -> Iterator[Attention]:
    """Fused attentions that were given no scale."""
    for node, index in flow.place.items():
        if "scaled_dot_product" in name_of(node) and node.args.get("scale") is None:
            query, key, value = (node.args[name].value for name in ("query", "key", "value"))
            why = Pin("", str(node.target), node.module, node.source)
            yield Attention(query, query not in (key, value), range(index, index + 1), why)


def _fix(targets: Targets) -> Fixed:
    return tuple((name, dim, tuple(sorted(at))) for (name, dim), at in targets.items())


def find_attentions(program: Program) -> dict[Node, Fixed]:
    """What multiplies the logits of every attention, by its softmax or its fused operator."""
    flow = Dataflow(program)
    fold = Fold(flow)
    targets = {node: fold.targets(query.value) for node, query in find_queries(program)}
    return {node: _fix(found) for node, found in targets.items() if found}


def _rearrange(node: Node, given: list[Tensor]) -> Any:
    """Run a view; on expanded tensors, which are small, unless it wants them written out."""
    try:
        return call_bound(node.target, _replace(node.args, iter(given)))
    except RuntimeError:
        whole = iter([index.contiguous() for index in given])
        return call_bound(node.target, _replace(node.args, whole))


def _present(positions: Tensor) -> set[int]:
    """The positions that stand somewhere; −1 stands for none of them."""
    for dim, stride in enumerate(positions.stride()):
        if stride == 0 and positions.shape[dim]:
            positions = positions.narrow(dim, 0, 1)
    return set(positions.unique().tolist()) - {-1}


def _replace(args: Any, given: Iterator[Tensor]) -> dict[str, Any]:
    def swap(value: Any) -> Any:
        if isinstance(value, Ref):
            return next(given)
        return [swap(item) for item in value] if isinstance(value, list) else value

    return {name: swap(value) for name, value in args.items()}
