"""Who makes and who reads the values of a traced program: the one place where that is asked."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

from torch._ops import OpOverload

from prunus.graph.program import Node, Path, Program, Ref, refs_in

_OPERANDS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "_grouped_mm": ("self", "mat2"),
    "convolution": ("input", "weight"),
    "_convolution": ("input", "weight"),
}
"""Products of two operands, by the names of their arguments; other products are not looked at."""


class Product(NamedTuple):
    """A product of activations with a weight, or with what is made of weights alone.

    Attributes
    ----------
    node
        The operator.
    data, dim
        The activations, and their dim that is summed over.
    weight, name
        The weight, and the name of the tensor that it is a view of; empty if it is computed.
    """

    node: Node
    data: Ref
    dim: int
    weight: Ref
    name: str


class Dataflow:
    """What a program's operators make and read.

    Attributes
    ----------
    maker
        The operator that gives a value.
    place
        When an operator runs.
    reads
        The values that an operator reads, in order, as often as it does.
    readers
        The operators that read a value, each once, in order.
    names
        Of the tensor behind every value that is a named one or a view of it.
    fixed
        Values that are made of named tensors and constants alone.
    stored
        Those of them that are such a tensor, or made of one alone.
    roots
        For a view the value that it is a view of.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.maker: dict[int, Node] = {}
        self.place: dict[Node, int] = {}
        self.reads: dict[Node, list[int]] = {}
        self.readers: dict[int, list[Node]] = {}
        self.names: dict[int, str] = dict(program.state)
        self.fixed: set[int] = {*program.state, *program.constants}
        self.stored = set(self.fixed)
        self.roots: dict[int, int] = {}
        for place, node in enumerate(program.nodes):
            self.place[node] = place
            self.maker.update(dict.fromkeys(node.outputs, node))
            read = self.reads[node] = read_by(node)
            for value in dict.fromkeys(read):
                self.readers.setdefault(value, []).append(node)
            if is_view(node):
                self.roots.update(dict.fromkeys(node.outputs, self.root(read[0])))
                if read[0] in self.names:
                    self.names.update(dict.fromkeys(node.outputs, self.names[read[0]]))
            if read and self.fixed.issuperset(read):
                self.fixed.update(node.outputs)
                if len(read) == 1 and read[0] in self.stored:
                    self.stored.update(node.outputs)

    def of(self, program: Program) -> Dataflow:
        """The same of a program with the same operators and values."""
        made = copy(self)
        made.program = program
        return made

    def state_behind(self, value: int) -> Iterator[int]:
        """The values of named tensors that a value was computed from; itself if it is one."""
        pending, seen = [value], {value}
        while pending:
            number = pending.pop()
            if number in self.program.state:
                yield number
            elif number in self.maker:
                behind = set(self.reads[self.maker[number]]) - seen
                seen |= behind
                pending += sorted(behind)

    def root(self, value: int) -> int:
        """The value that it is a view of, or itself: what is written to one changes the other."""
        return self.roots.get(value, value)

    def uses(self, name: str) -> list[Node]:
        """The operators that read a named tensor, or a view of it; views are none."""
        found: dict[Node, None] = {}
        for value, own in self.names.items():
            if own == name:
                found.update(dict.fromkeys(self.readers.get(value, ())))
        others = [n for n in found if not n.outputs or not set(n.outputs) <= self.names.keys()]
        return sorted(others, key=self.place.__getitem__)

    def products(self) -> Iterator[tuple[Node, str, Product | None]]:
        """Every product of two operands, with the name of a weight that it reads.

        None where it is one of two activations, or of two weights.
        """
        for node in self.program.nodes:
            names = _OPERANDS.get(name_of(node))
            if names is not None and contracts(node):  # a depthwise convolution has no channels
                refs: list[Ref] = [node.args[name] for name in names]
                named = [self.names.get(ref.value, "") for ref in refs]
                name = named[1] or named[0]
                yield node, name, self._product(node, names, refs, name)

    def _product(
        self, node: Node, names: tuple[str, str], refs: list[Ref], name: str
    ) -> Product | None:
        fixed = [ref.value in self.fixed for ref in refs]
        if node.effect is None or fixed[0] == fixed[1]:
            return None
        dims = {str(place[0]): dim for place, dim in node.effect.contracted}
        data = fixed.index(False)
        return Product(node, refs[data], dims[names[data]], refs[1 - data], name)


def operand_names(operator: str) -> tuple[str, str] | None:
    """The arguments of a product of two operands, by its name; None if it is none.

    >>> operand_names("aten::addmm"), operand_names("aten::relu")
    (('mat1', 'mat2'), None)
    """
    return _OPERANDS.get(operator.partition("::")[2])


def name_of(node: Node) -> str:
    """The operator's name: ``"mm"`` of ``aten::mm``."""
    return str(node.target._schema.name).partition("::")[2]


def is_view(node: Node) -> bool:
    """Whether an operator gives its first argument, or a view of it."""
    return _returns_view(node.target) and bool(refs_in(node.args))


@functools.lru_cache(1 << 12)
def _returns_view(target: OpOverload) -> bool:
    returns = target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def operand(node: Node, path: Path) -> Any:
    """The argument at a place, which may stand in a list."""
    name, *rest = path
    found = node.args[str(name)]
    for index in rest:
        found = found[index]
    return found


def contracts(node: Node) -> bool:
    """Whether an operator sums over a dim of its factors."""
    return node.effect is not None and bool(node.effect.contracted)


def read_by(node: Node) -> list[int]:
    """Numbers of the values that an operator reads, in order, as often as it does."""
    return [ref.value for ref in refs_in(node.args)]
