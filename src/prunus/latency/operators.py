"""The operators of a traced model as plain data, with letters for the widths that may change.

Two convolutions of one shape are one operator, so they share what was measured of it, within a
model and between models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from prunus.errors import PlanError
from prunus.graph.axis import Label
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, Program, Ref, refs_in

LETTERS = "abcdefghijklmnopqrstuvwxyz"

Size = int | str
"""An int, or the letter of a width."""

Absorbs = Callable[[str, str], bool]
"""Whether an operator, given the name of the one that feeds it and its own, costs nothing."""


@dataclass(frozen=True)
class Operator:
    """An operator and all that its time depends on but its widths.

    Attributes
    ----------
    key
        JSON: the overload, its arguments (a tensor as its shape, with letters for widths), the
        shapes that come out, the full widths, and what a backend computes along with it.
    factors
        For a contraction, the letters whose widths are multiplied in its MACs, by number, a width
        that enters twice twice; None for any other operator.
    """

    key: str
    factors: tuple[int, ...] | None

    @cached_property
    def document(self) -> dict[str, Any]:
        """The key, parsed."""
        found: dict[str, Any] = json.loads(self.key)
        return found

    @property
    def full(self) -> tuple[int, ...]:
        """The widths of the dense model, one for each letter."""
        return tuple(self.document["full"])

    @property
    def name(self) -> str:
        """Without namespace and overload: ``"convolution"``."""
        return str(self.document["target"]).split(".")[1]

    @property
    def followers(self) -> list[tuple[str, dict[str, Any]]]:
        """What is computed along with it on its output, in order: overloads, other arguments."""
        return [(target, args) for target, args in self.document.get("then", ())]

    def followed_by(self, target: str, args: Mapping[str, Any]) -> Operator:
        """This operator with one more that is computed along with it."""
        document = {**self.document, "then": [*self.document.get("then", ()), [target, args]]}
        return Operator(_key(document), self.factors)

    @cached_property
    def shapes(self) -> tuple[tuple[Size, ...], ...]:
        """Of all tensors that are read or written."""
        read = [tuple(t["shape"]) for t in tensors_in(self.document["args"])]
        return (*read, *(tuple(shape) for shape in self.document["out"]))

    @cached_property
    def volume(self) -> tuple[int, dict[tuple[int, ...], int]]:
        """Elements read and written: the fixed ones, and monomials over the letters' numbers."""
        fixed, terms = 0, dict[tuple[int, ...], int]()
        for shape in self.shapes:
            letters = tuple(sorted(LETTERS.index(s) for s in shape if isinstance(s, str)))
            constant = prod(s for s in shape if isinstance(s, int))
            if letters:
                terms[letters] = terms.get(letters, 0) + constant
            else:
                fixed += constant
        return fixed, terms

    @cached_property
    def is_heavy(self) -> bool:
        """Whether most of what it reads and writes is weights: these are read once in a forward."""
        tensors = list(tensors_in(self.document["args"]))
        sizes = [prod(at_widths(list(t["shape"]), self.full)) for t in tensors]
        held = sum(n for n, t in zip(sizes, tensors, strict=True) if t.get("held"))
        return bool(2 * held > self.count_elements(self.full))

    def count_elements(self, widths: Sequence[float]) -> float:
        """Elements read and written at these widths, one for each letter."""
        fixed, terms = self.volume
        return fixed + sum(c * prod(widths[n] for n in letters) for letters, c in terms.items())


@dataclass(frozen=True)
class Invocation:
    """One operator of a program: which, and the numbers of the labelled dims of its letters."""

    operator: Operator
    dims: tuple[int, ...]
    module: str


@dataclass(eq=False)
class _Reader:
    """Turns the nodes of a program into invocations, and collects labelled dims."""

    program: Program
    labels: list[Label]
    dtype: str
    index: dict[bytes, int] = field(default_factory=dict)
    known: dict[int, tuple[Label, int | None]] = field(default_factory=dict)
    turned: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for number, label in enumerate(self.labels):
            self.index.setdefault(_content(label), number)
        self.held.update(self.program.state)

    def dim_of(self, label: Label | None) -> int | None:
        """The number of a labelled dim; None where all of it is kept."""
        if label is None:
            return None
        cached = self.known.get(id(label))
        if cached is None:
            units = self.program.label(label)
            number = None
            if units is not None:
                number = self.index.setdefault(_content(units), len(self.labels))
                if number == len(self.labels):
                    self.labels.append(units)
            cached = self.known[id(label)] = label, number
        return cached[1]

    def follow(self, node: Node) -> None:
        """Remember which values are views of weights, and which are transposed."""
        if node.target.is_view and node.outputs:
            source = next(iter(node.args.values()))
            if isinstance(source, Ref) and source.value in self.held:
                self.held.update(node.outputs)
            if str(node.target) == "aten.t.default":
                self.turned.update(node.outputs)

    def read(self, node: Node) -> Invocation | None:
        """The invocation, or None for an operator whose time no width changes."""
        self.follow(node)
        if node.target.is_view or node.effect is None or str(node.target) in _NOTHING_RUNS:
            return None
        dims: list[int] = []

        def size(number: int, label: Label | None) -> Size:
            dim = self.dim_of(label)
            if dim is None:
                return number
            if dim not in dims:
                dims.append(dim)
            return LETTERS[dims.index(dim)]

        try:
            args = {n: self._describe(v, size) for n, v in node.args.items()}
        except TypeError:
            return None
        for name, value in node.effect.sizes.items():
            args[name] = _sizes(value, size)
        out = [self._shape(number, size) for number in node.outputs]
        if not dims or len(dims) > len(LETTERS):
            return None
        document = {
            "target": str(node.target), "dtype": self.dtype, "args": args, "out": out,
            "full": [len(self.labels[dim]) for dim in dims],
        }  # fmt: skip
        factors = None
        for span in node.effect.spans:
            found = [self.dim_of(label) for _, label in span]
            factors = tuple(sorted(dims.index(d) for d in found if d is not None and d in dims))
        return Invocation(Operator(_key(document), factors), tuple(dims), node.module)

    def _shape(self, value: int, size: Callable[[int, Label | None], Size]) -> list[Size]:
        pairs = zip(self.program.shapes[value], self.program.labels[value], strict=True)
        return [size(number, label) for number, label in pairs]

    def _describe(self, value: Any, size: Callable[[int, Label | None], Size]) -> Any:
        if isinstance(value, Ref):
            found: dict[str, Any] = {"shape": self._shape(value.value, size)}
            found.update({"held": True} if value.value in self.held else {})
            found.update({"turned": True} if value.value in self.turned else {})
            return found
        if isinstance(value, (list, tuple)):
            return [self._describe(item, size) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return None  # as the inputs have it
        raise TypeError(f"{type(value).__name__} is no plain data")


_NOTHING_RUNS = (
    "aten.empty.memory_format", "aten.detach.default", "aten.lift_fresh.default",
    "aten._unsafe_view.default",
)  # fmt: skip


def find_invocations(
    graph: CouplingGraph, dtype: str, absorbs: Absorbs
) -> tuple[tuple[Invocation, ...], tuple[Label, ...]]:
    """The operators whose time depends on widths, and the labelled dims that they speak of.

    Parameters
    ----------
    graph
        What :func:`prunus.trace` found.
    dtype
        Of the model's numbers: ``"float32"``.
    absorbs
        Which operators a backend computes along with the one that feeds them.

    Returns
    -------
    invocations
        In the order of the program, without what is absorbed.
    labels
        ``graph.width_labels``, and after them further dims.
    """
    program = graph.program
    if program is None:
        raise PlanError(
            "the graph has no program to time",
            why="it was not made by prunus.trace",
            fix="trace the model again",
        )
    reader = _Reader(program, list(graph.width_labels), dtype)
    feeds: dict[int, tuple[str, int]] = {}
    found: list[Invocation] = []
    for node in program.nodes:
        name = str(node.target).split(".")[1]
        before = [feeds[ref.value] for ref in refs_in(node.args) if ref.value in feeds]
        absorbed = bool(before) and absorbs(before[0][0], name)
        invocation = reader.read(node)
        source = before[0] if absorbed else (name, -1)
        if absorbed and source[1] >= 0:
            found[source[1]] = _followed(found[source[1]], node)
        elif invocation is not None and not absorbed:
            source = name, len(found)
            found.append(invocation)
        feeds.update(dict.fromkeys(node.outputs, source))
    return tuple(found), tuple(reader.labels)


def _followed(head: Invocation, node: Node) -> Invocation:
    """The invocation with an operator that is computed along with it.

    One that reads further tensors, as a norm does, is taken to be folded into the weights, and
    one whose arguments are no plain data can't be run alone: they are left out.
    """
    first, *others = node.args.items()
    plain = all(value is None or isinstance(value, (int, float, str)) for _, value in others)
    if not isinstance(first[1], Ref) or not plain:
        return head
    return replace(head, operator=head.operator.followed_by(str(node.target), dict(others)))


def _key(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def tensors_in(value: Any) -> Iterator[dict[str, Any]]:
    """The tensors among described arguments, in order."""
    if isinstance(value, Mapping):
        if "shape" in value:
            yield dict(value)
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from tensors_in(item)


def at_widths(value: Any, widths: Sequence[int]) -> Any:
    """Described arguments or shapes with numbers for the letters of their sizes."""
    if isinstance(value, Mapping):
        return {name: at_widths(item, widths) for name, item in value.items()}
    if isinstance(value, list):
        return [at_widths(item, widths) for item in value]
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(widths)]:
        return widths[LETTERS.index(value)]
    return value


def _sizes(value: Any, size: Callable[[int, Label | None], Size]) -> Any:
    """Integer arguments that are (size, label), in nested lists."""
    if isinstance(value, list):
        return [_sizes(item, size) for item in value]
    number, label = value
    return size(number, label)


def _content(label: Label) -> bytes:
    """What a label says; in which order the units of a position are written does not matter."""
    return bytes(str(label.shape), "ascii") + np.sort(label, axis=1).tobytes()
