"""Which second moments are worth taking, and which weights share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunus.calibration.im2col import Window, window_of
from prunus.calibration.second_moments import Moments, fit_memory
from prunus.graph.axis import Axis, Label, Mask, Role, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, Program, Ref, refs_in

WIDEST = 8192
"""Columns above which products are summed up for every tap of a convolution apart."""


@dataclass(frozen=True)
class SecondMoments:
    """What second moments are taken of.

    Attributes
    ----------
    kept
        Units that stay: then only of what reads a unit that goes.  None: of all that reads units.
    positions
        Of an image at which a convolution is looked at.
    memory_limit
        Bytes that all sums may take.
    also
        Weights of which they are taken whatever they read.
    """

    kept: Mask | None = None
    positions: int = 64
    memory_limit: int = 8 << 30
    also: frozenset[str] = frozenset()

    def concerns(self, tensor: str, label: Label) -> bool:
        """Whether a weight is asked for, or reads a dim on which anything is lost."""
        if tensor in self.also:
            return True
        if self.kept is None:
            return bool(label.any())
        return len(kept_positions(label, self.kept)) < len(label)


@dataclass(frozen=True, eq=False)
class Reading:
    """One recorded product of activations with the weight of a site: its window, what it reads."""

    node: Node
    data: Ref
    weight: Ref

    def window(self, program: Program) -> Window:
        return window_of(self.node.args, program.shapes[self.weight.value])


class Identity:
    """Tells values of a program apart: two views of one tensor taken alike are one value."""

    def __init__(self, program: Program) -> None:
        self._keys: dict[int, Any] = {}
        self._roots: dict[int, int] = {}
        self._epochs: list[tuple[int, int]] = []
        for index, node in enumerate(program.nodes):
            refs = refs_in(node.args)
            returns = node.target._schema.returns
            if not refs or not returns or returns[0].alias_info is None:
                continue
            root = self._roots.get(refs[0].value, refs[0].value)
            for place, number in enumerate(node.outputs):
                self._roots[number] = root
                if node.target._schema.is_mutable:
                    self._epochs.append((index, root))
                else:
                    said = [(name, self._told(value)) for name, value in node.args.items()]
                    self._keys[number] = (str(node.target), place, *said)
        self._index = {id(node): index for index, node in enumerate(program.nodes)}

    def of(self, node: Node, value: int) -> Any:
        """What a node reads as that value: equal for equal content."""
        root = self._roots.get(value, value)
        before = self._index[id(node)]
        changes = sum(index < before and other == root for index, other in self._epochs)
        return (self._keys.get(value, value), changes)

    def _told(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._keys.get(value.value, value)
        if isinstance(value, (list, tuple)):
            return tuple(self._told(item) for item in value)
        return value


def share_moments(
    program: Program,
    sites: Sequence[tuple[str, Label, Sequence[Reading]]],
    weights: Mapping[int, tuple[int, ...]],
    options: SecondMoments,
) -> list[tuple[Moments | None, Window]]:
    """Moments for every site of which they are wanted, within the memory that is allowed.

    Sites that read the same values in the same way share one object.  A site has none whose
    weight is not read as a whole, in one way (slices of a tensor, experts).

    Parameters
    ----------
    sites
        Name of the weight, label and readings of each.
    weights
        Shape of the whole tensor behind a weight that is read, by value number.
    """
    identity = Identity(program)
    shared: dict[Any, tuple[Moments, int]] = {}
    found: list[tuple[Moments | None, Window]] = []
    for tensor, label, readings in sites:
        windows = {reading.window(program) for reading in readings}
        window = next(iter(windows))
        shapes = [program.shapes[reading.weight.value] for reading in readings]
        whole = all(
            sorted(shape) == sorted(weights.get(reading.weight.value, ()))
            and (bool(window.kernel) or len(shape) == 2)
            for shape, reading in zip(shapes, readings, strict=True)
        )
        if len(windows) > 1 or not whole or not options.concerns(tensor, label):
            found.append((None, window))
            continue
        key = (window, *(identity.of(r.node, r.data.value) for r in readings))
        columns = len(label) // window.groups * window.taps
        shared.setdefault(key, (Moments(window.groups, columns), window.taps))
        found.append((shared[key][0], window))
    fit_memory(list(shared.values()), options.memory_limit, WIDEST)
    return found


def contracted_dim(graph: CouplingGraph, tensor: str, label: Label, window: Window) -> int | None:
    """Which dim of a weight that reads those units is summed over; None if that is not certain."""
    shape = graph.shapes.get(tensor, ())
    if window.kernel:
        return 0 if window.transposed else 1
    dims = [
        dim
        for dim in range(len(shape))
        if graph.roles.get(Axis(tensor, dim)) is Role.CONSUMER and shape[dim] == len(label)
    ]
    if len(shape) != 2:
        return None
    return dims[0] if len(dims) == 1 else _recorded_dim(graph.program, tensor)


def _recorded_dim(program: Program, tensor: str) -> int | None:
    """Which dim of a matrix its only product sums over, for dims on which there are no units."""
    dims = {n: (0, 1) for n, name in program.state.items() if name == tensor}
    found: set[int] = set()
    for node in program.nodes:
        (*refs,) = refs_in(node.args)
        if not any(ref.value in dims for ref in refs):
            continue
        if str(node.target) in ("aten.t.default", "aten.transpose.int"):
            dims[node.outputs[0]] = dims[refs[0].value][::-1]
            continue
        for (name, *_), dim in node.effect.contracted if node.effect is not None else ():
            reference = node.args[str(name)]
            if isinstance(reference, Ref) and reference.value in dims:
                found.add(dims[reference.value][dim])
    return next(iter(found)) if len(found) == 1 else None
