"""The traced program: what ran, in order, its effect on labels, and the labels on every value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from prunus.graph.axis import Label
from prunus.graph.expressions import Expression

Labels = tuple[Label | None, ...]
"""One entry per dim of a tensor."""

Path = tuple[str | int, ...]
"""Where an argument stands: ``("input",)``, or ``("tensors", 1)`` inside a list."""

Place = tuple[Path, int]
"""One dim of one tensor argument."""


Span = tuple[tuple[int, Label | None], ...]
"""Dims whose sizes are multiplied, as (size, label)."""


Equations = tuple[tuple[Expression, int, Label | None], ...]
"""Sizes that the forward's code states, as (expression, size, label of the dim)."""


@dataclass(frozen=True)
class Effect:
    """What an operator does to labels.

    Attributes
    ----------
    outputs
        Labels of every tensor among the outputs, in order.
    contracted
        Dims that are summed over: a removed position has to contribute nothing there.
    produced
        Dims of operands that become dims of the output of a contraction.
    mixing
        Dims over which every position sees the others (norms, softmax, reductions): the operator
        runs on the kept positions alone.
    sizes
        Integer arguments that speak of labelled dims, as the labels whose count they are
        (a plain int stays as it is): ``{"normalized_shape": [label]}``.
    spans
        The operator's MACs: a sum of products over dims, each as (size, label).
    at_least
        Dims, or slices of dims, with the number of positions that they have to keep.
    equations
        Sizes that the forward's code states; a plain int pins its dim.
    aligned
        Dims of which the kernel takes multiples only, as (label, multiple).
    counted
        Outputs whose values are positions along a dim, as (output, label of the dim): the experts
        that a router picks, say.  What looks up rows by them is tied to the dim; once anything
        else reads such an output, the dim stays whole.
    """

    outputs: tuple[Labels, ...]
    contracted: tuple[Place, ...] = ()
    produced: tuple[Place, ...] = ()
    mixing: tuple[Place, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    at_least: tuple[tuple[Label, int], ...] = ()
    equations: Equations = ()
    aligned: tuple[tuple[Label | None, int], ...] = ()
    counted: tuple[tuple[int, Label], ...] = ()


UnitLabels = tuple[Label | None, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value of that number in recorded arguments."""

    value: int


def refs_in(value: Any) -> list[Ref]:
    """Every value that recorded arguments speak of, in order, as often as they do.

    >>> refs_in({"input": Ref(3), "tensors": [Ref(1), (Ref(3), 2)]})
    [Ref(value=3), Ref(value=1), Ref(value=3)]
    """
    if not isinstance(value, (dict, list, tuple)):
        return [value] if isinstance(value, Ref) else []
    items = value.values() if isinstance(value, dict) else value
    return [ref for item in items if isinstance(item, _HOLDERS) for ref in refs_in(item)]


_HOLDERS = (Ref, dict, list, tuple)


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operator that ran.

    ``args`` holds every argument by name with :class:`Ref` for tensors; ``effect`` is what its
    rule said, None for an operator without a rule.
    """

    target: OpOverload
    args: Mapping[str, Any]
    outputs: tuple[int, ...]
    effect: Effect | None
    module: str
    source: str


@dataclass(slots=True)
class Lifetime:
    """Of a tensor's memory, in operators; ``died`` is the first that runs without it."""

    value: int
    element_size: int
    born: int
    died: int | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A straight line of operators from inputs and state to outputs.

    Attributes
    ----------
    inputs
        Value numbers of the input tensors, in the order of :func:`tensors_of`.
    state
        Value number → name of the parameter, buffer or tensor attribute.
    constants
        Value number → a tensor that came from elsewhere (a closure, a cache).
    outputs
        Name → value number of every output tensor whose shape is kept.
    labels, shapes
        By value number: the labels of its dims as the tracer left them, in atoms; its shape.
    lifetimes
        When the memory of each tensor that was made came and went.
    strides
        By value number; () for a tensor that has none.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    state: Mapping[int, str]
    constants: Mapping[int, Tensor] = field(repr=False)
    outputs: Mapping[str, int]
    labels: tuple[UnitLabels, ...] = field(repr=False)
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)
    resolve: Any = field(repr=False)
    lifetimes: tuple[Lifetime, ...] = field(default=(), repr=False)
    strides: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def value_label(self, reference: Any, dim: int) -> Label | None:
        """The label, in units, of one dim of a recorded argument."""
        if not isinstance(reference, Ref):
            return None
        return self.label(self.labels[reference.value][dim])

    def label(self, label: Label | None) -> Label | None:
        """A label of atoms, as the tracer left it, in terms of units; None if all is kept."""
        found: Label | None = self.resolve(label)
        return found


def tensors_of(structure: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Tensors in nested containers with dotted names, in a stable order.

    Lists, tuples, mappings and dataclasses are searched, other objects (caches, say) are not.

    >>> import torch
    >>> [name for name, _ in tensors_of({"a": [torch.ones(1)], "b": torch.ones(1)})]
    ['a.0', 'b']
    """
    if isinstance(structure, Tensor):
        return [(path or "output", structure)]
    found: list[tuple[str, Tensor]] = []
    for name, value in _items(structure):
        found += tensors_of(value, f"{path}.{name}" if path else str(name))
    return found


def _items(structure: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(structure, Mapping):
        return structure.items()
    if isinstance(structure, (list, tuple)):
        names = getattr(structure, "_fields", range(len(structure)))
        return zip(names, structure, strict=True)
    if hasattr(structure, "__dataclass_fields__") and not isinstance(structure, type):
        return [(name, getattr(structure, name)) for name in structure.__dataclass_fields__]
    return ()


def stored(module: nn.Module, name: str) -> Any:
    """What a module itself keeps under a name, or None: no code of its class is run for it.

    A property of the same name may raise anything.
    """
    stores = (vars(module), module._parameters, module._buffers, module._modules)
    return next((store[name] for store in stores if name in store), None)


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters, buffers and tensor attributes by first name, and the other names of tied ones.

    A sparse tensor that a module keeps as a plain attribute (the adjacency of a graph) is data,
    not state: nothing slices it, and no file holds it.

    Returns
    -------
    state
        Name → tensor, each tensor once.
    aliases
        Other name → first name.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, module in _modules_in(model):
        for own, tensor in _tensors_in(module):
            name = f"{prefix}.{own}" if prefix else own
            if id(tensor) in first:
                aliases.setdefault(name, first[id(tensor)])
            else:
                first[id(tensor)] = name
                state[name] = tensor
    return state, aliases


def modules_in(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``named_modules()`` gives, of which each level takes time anew."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in _modules_in(model):
        found.setdefault(id(module), (path, module))
    return list(found.values())


def _modules_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What ``named_modules(remove_duplicate=False)`` gives, of which each level takes time anew."""
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        for name, child in reversed(list(module._modules.items())):
            if child is not None:
                waiting.append((f"{prefix}.{name}" if prefix else name, child))


def _tensors_in(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module itself holds: parameters, buffers, and dense tensor attributes."""
    for store in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in store.items() if tensor is not None)
    for name, value in vars(module).items():
        # The type of most says so in half the time.
        tensor = type(value) not in _PLAIN and isinstance(value, Tensor)
        if tensor and value.layout == torch.strided:
            yield name, value


_PLAIN = frozenset((dict, OrderedDict, set, list, tuple, bool, int, float, str, type(None)))
