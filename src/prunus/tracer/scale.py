"""Where the softmax scale of a fused attention can be kept when its head dim shrinks.

``scaled_dot_product_attention`` without ``scale=`` divides by the square root of the head dim
that it sees.  To keep the original scale, the query is multiplied by √(new / old): folded into
the weights that compute it, which are found by walking back through linear operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.tracer.program import Node, Program, Ref
from prunus.tracer.registry import call_bound

Targets = dict[tuple[str, int], set[int]]
"""(tensor, dim) → positions to be multiplied."""

Fixed = tuple[tuple[str, int, tuple[int, ...]], ...]
"""The same as a constant: (tensor, dim, positions)."""

_VIEWS = {
    "view",
    "_unsafe_view",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "unbind",
    "cat",
    "stack",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "unsafe_split",
    "chunk",
}
_SAME = {"mul", "neg", "_to_copy", "add", "sub", "mul_", "add_", "div"}


class Fold:
    """Finds the weights that a query is linear in.

    Parameters
    ----------
    nodes
        The recorded operators.
    state
        Value number → tensor name.
    shapes
        Value number → shape.
    """

    def __init__(
        self, nodes: Sequence[Node], state: dict[int, str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._maker = {out: node for node in nodes for out in node.outputs}
        self._state = state
        self._shapes = shapes

    def maker(self, value: int) -> Node | None:
        """The operator that made a value."""
        return self._maker.get(value)

    def targets(self, query: int) -> Targets | None:
        """What to multiply so that the query is multiplied; None if it isn't linear in weights."""
        found: Targets = {}
        index = self._columns(query)
        if index is None:
            return None
        for name, dim, positions in index:
            present = positions[positions >= 0].unique().tolist()
            found.setdefault((name, dim), set()).update(present)
        return found

    def _columns(self, value: int) -> list[tuple[str, int, Tensor]] | None:
        """For every weight that the value is linear in: which of its positions stands where."""
        node = self._maker.get(value)
        if node is None:
            return None
        source = self._source(node, value)
        if source is not None:
            return source
        name = node.target._schema.name.partition("::")[2]
        if name in ("mul", "mul_", "div"):
            return self._product(node, value)
        if name not in _VIEWS | _SAME:
            return None
        carried: list[list[tuple[str, int, Tensor]]] = []
        references = list(_references(node.args))
        for reference in references:
            columns = self._columns(reference.value)
            if columns is None:
                return None
            carried.append(columns)
        if name in _VIEWS:
            return self._viewed(node, value, references, carried)
        shape = self._shapes[value]
        return [(w, d, index.expand(shape)) for part in carried for w, d, index in part]

    def _product(self, node: Node, value: int) -> list[tuple[str, int, Tensor]] | None:
        """One factor is enough: a parameter if there is one, else whichever is linear."""
        references = list(_references(node.args))
        if node.target._schema.name == "aten::div":
            references = references[:1]
        for reference in references:
            columns = self._parameter(reference.value) or self._columns(reference.value)
            if columns is not None:
                return [(w, d, index.expand(self._shapes[value])) for w, d, index in columns]
        return None

    def _parameter(self, value: int) -> list[tuple[str, int, Tensor]] | None:
        """A vector of state as a factor: all of its positions, aligned to the right."""
        name, shape = self._state.get(value), self._shapes[value]
        if name is None or len(shape) != 1:
            return None
        return [(name, 0, torch.arange(shape[0]))]

    def _source(self, node: Node, value: int) -> list[tuple[str, int, Tensor]] | None:
        """A weight whose rows make the value's last dim (a convolution's second)."""
        name = node.target._schema.name.partition("::")[2]
        shape = self._shapes[value]
        if name in ("native_layer_norm", "_fused_rms_norm"):
            named = [("weight", 0), ("bias", 0)]
        elif name in ("mm", "addmm"):
            named = [("mat2", 1), ("self", 0)] if name == "addmm" else [("mat2", 1)]
        elif name == "convolution" and not node.args["transposed"]:
            named = [("weight", 0), ("bias", 0)]
        else:
            return None
        dim = 1 if name == "convolution" else len(shape) - 1
        index = torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        found: list[tuple[str, int, Tensor]] = []
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
        while value not in self._state:
            node = self._maker.get(value)
            name = "" if node is None else node.target._schema.name.partition("::")[2]
            if node is None or name not in ("t", "detach", "alias", "_to_copy"):
                return None
            dim = 1 - dim if name == "t" else dim
            value = node.args["self"].value
        return self._state[value], dim

    def _viewed(
        self,
        node: Node,
        value: int,
        references: list[Ref],
        carried: list[list[tuple[str, int, Tensor]]],
    ) -> list[tuple[str, int, Tensor]]:
        """Run the same rearrangement on the positions."""
        result = []
        longest = max(len(part) for part in carried)
        for turn in range(longest):
            parts = [part[min(turn, len(part) - 1)] for part in carried]
            keys = list(dict.fromkeys((w, d) for w, d, _ in parts))
            for weight, dim in keys:
                given = iter(
                    index if (w, d) == (weight, dim) else torch.full_like(index, -1)
                    for w, d, index in parts
                )
                out = call_bound(node.target, _replace(node.args, given))
                out = out[node.outputs.index(value)] if isinstance(out, (list, tuple)) else out
                result.append((weight, dim, out))
        return result


def find_rescales(
    nodes: Sequence[Node], state: dict[int, str], shapes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Node, Targets | None]]:
    """Fused attentions with the default scale, and what their query is linear in."""
    fold = Fold(nodes, state, shapes)
    for node in nodes:
        if "scaled_dot_product" in node.target._schema.name and node.args.get("scale") is None:
            yield node, fold.targets(node.args["query"].value)


def find_attentions(program: Program) -> dict[int, Fixed]:
    """Attentions by the position of their operator: what multiplies the logits.

    Fused ones, and softmax over products of two computed tensors; the keys are positions of the
    fused operator or of the softmax.
    """
    fold = Fold(program.nodes, dict(program.state), program.shapes)
    found: dict[int, Fixed] = {}
    for index, node in enumerate(program.nodes):
        query = _query_of(node, fold)
        targets = None if query is None else fold.targets(query)
        if targets:
            fixed = [(name, dim, tuple(sorted(at))) for (name, dim), at in targets.items()]
            found[index] = tuple(fixed)
    return found


def _query_of(node: Node, fold: Fold) -> int | None:
    """The value number of the query behind a fused attention or a softmax, if it is one."""
    name = node.target._schema.name
    if "scaled_dot_product" in name:
        return int(node.args["query"].value)
    if name not in ("aten::_softmax", "aten::_safe_softmax"):
        return None
    maker = fold.maker(node.args["self"].value)
    while maker is not None:
        name = maker.target._schema.name.partition("::")[2]
        if name in ("bmm", "baddbmm"):
            return int(maker.args["batch1" if name == "baddbmm" else "self"].value)
        if name not in _VIEWS | _SAME | {"masked_fill", "where", "masked_fill_"}:
            return None
        reference = maker.args.get("self")
        maker = fold.maker(reference.value) if isinstance(reference, Ref) else None
    return None


def _references(args: Any) -> Iterator[Ref]:
    for value in args.values():
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, Ref))


def _replace(args: Any, given: Iterator[Tensor]) -> dict[str, Any]:
    def swap(value: Any) -> Any:
        if isinstance(value, Ref):
            return next(given)
        return [swap(item) for item in value] if isinstance(value, list) else value

    return {name: swap(value) for name, value in args.items()}
