"""Where weights read units: found in the recorded program, and found again while a forward runs.

A dispatch mode sees every product of activations with weights.  The weights say which recorded
operator it is, through the storage that they live in; where weights are computed (a normalised
weight), the module that runs and the order of its operators do.  The recorded operator says which
units stand on the positions that are summed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.calibration.im2col import Window, columns_of, window_of
from prunus.calibration.moments import Moments
from prunus.errors import DataError
from prunus.graph.axis import Label, Mask, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import Node, Program, Ref
from prunus.tracer.dataflow import (
    Dataflow,
    Product,
    is_view,
    name_of,
    operand_names,
    read_by,
)
from prunus.tracer.registry import bind

_CHUNK = 1 << 22
"""Elements that are widened to float64 at a time: 32 MiB."""

_ROWS = 1 << 12
"""Rows whose products are summed up in the type of the activations."""


@dataclass(eq=False)
class Site:
    """A place where weights read activations: sums per position of the dim that is contracted.

    Attributes
    ----------
    tensor
        Name of the weight; empty if it is computed from others.
    module
        Path of the module that ran the product when it was traced.
    label
        Units on the positions, shape ``(n, k)``.
    place
        When it first runs: the number of the operator in the program.
    readings
        How many operators of the program read this way.
    dim
        Of the weight: the one that is summed over; None where the weight is not read as a whole,
        always in one way (slices of a tensor, experts).
    source
        The place of the first site that reads the same values in the same way.
    count
        How many vectors of ``n`` activations were seen.
    total, square
        Σ h and Σ h² over them, shape ``(n,)``.
    weights
        Σ W² of the weights that read each position, shape ``(n,)``, for every part of the tensor
        that did: by where it starts and how many elements it has.
    window
        How a convolution reads its input.
    moments
        Mean and second moment of the columns that are read; sites of one source share one object.
        None where they were not wanted.
    """

    tensor: str
    module: str
    label: Label = field(repr=False)
    place: int = 0
    readings: int = 1
    dim: int | None = None
    source: int = 0
    count: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    weights: dict[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict, repr=False)
    window: Window = field(default_factory=Window, repr=False)
    moments: Moments | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.total, self.square = np.zeros(len(self.label)), np.zeros(len(self.label))

    @property
    def weight(self) -> NDArray[np.float64]:
        """Σ W² over all weights that read each position, shape ``(n,)``."""
        return sum(self.weights.values(), np.zeros(len(self.label)))

    @property
    def mean_square(self) -> NDArray[np.float64]:
        """Mean of h², shape ``(n,)``; zeros where nothing was seen."""
        return self.square / max(self.count, 1)

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance of h, with ``count`` below the line, shape ``(n,)``."""
        spread = self.mean_square - (self.total / max(self.count, 1)) ** 2
        return np.asarray(spread.clip(min=0))

    def loses(self, kept: Mask) -> bool:
        """Whether anything is removed of what is read here."""
        return len(kept_positions(self.label, kept)) < len(self.label)

    def kept_channels(self, kept: Mask) -> Tensor:
        """Which channels are kept, shape ``(groups, channels of a group)``."""
        found = torch.zeros(len(self.label), dtype=torch.bool)
        found[kept_positions(self.label, kept)] = True
        return found.view(self.window.groups, -1)

    def add(self, read: Read, part: tuple[int, int]) -> None:
        """Add the vectors that a product reads, by the weights of that part of the tensor."""
        rows = read.rows()
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        self.count += len(rows)
        for some in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
            wide = some.to(torch.float64)
            self.total += wide.sum(0).cpu().numpy()
            self.square += wide.square().sum(0).cpu().numpy()
        if not np.isfinite(self.square).all():
            raise self.not_finite()
        if part not in self.weights:
            self.weights[part] = read.weigh(len(self.label))

    def add_moments(self, read: Read, first: int, positions: int) -> None:
        """Add the columns that a product reads; see :meth:`Read.columns`."""
        if self.moments is None:
            return
        for part in read.columns(self.window, first, positions):
            self.moments.add(part)
        if not bool(torch.isfinite(self.moments.total).all()):
            raise self.not_finite()

    def not_finite(self) -> DataError:
        """The error for what is read here."""
        return DataError(
            "activations are NaN or infinite",
            where=f"the input of {self.tensor or self.module}",
            why="the calibration data holds such values, or the model makes them",
            fix="clean the data; for a model in half precision try float32",
        )


def kept_units(graph: CouplingGraph, plan: Plan) -> Mask:
    """The units of a graph that a plan for its model keeps."""
    plan.check_model(graph.shapes)
    return graph.mask_from_positions({a: np.asarray(stay) for a, stay in plan.keep.items()})


class Sites(NamedTuple):
    """All sites of a program, and in which order products read, by weight or by module.

    Products that read no units are there as None.
    """

    all: tuple[Site, ...]
    by_name: Mapping[str, Sequence[Site | None]]
    by_module: Mapping[str, Sequence[Site | None]]


def find_sites(graph: CouplingGraph, also: Collection[str] = ()) -> Sites:
    """Where weights read units; and of the weights in ``also``, whatever they read."""
    merged: dict[tuple[str, bytes], tuple[Site, list[Product]]] = {}
    by_name: dict[str, list[Site | None]] = {}
    by_module: dict[str, list[Site | None]] = {}
    flow = Dataflow(graph.program)
    for node, name, product in flow.products():
        expected = by_name.setdefault(name, []) if name else by_module.setdefault(node.module, [])
        label = None if product is None else _label_of(flow.program, product, also)
        if product is None or label is None:
            expected.append(None)
            continue
        key = (name or f"/{node.module}/{len(merged)}", label.tobytes())
        fresh = Site(name, node.module, label, place=flow.place[node])
        site, read = merged.setdefault(key, (fresh, []))
        read.append(product)
        expected.append(site)
    identity = _Identity(flow.program)
    sources: dict[Any, int] = {}
    for site, read in merged.values():
        _describe(site, read, flow, graph.shapes.get(site.tensor, ()))
        same = (site.window, *(identity.of(p.node, p.data.value) for p in read))
        site.source = sources.setdefault(same, site.place)
    return Sites(tuple(site for site, _ in merged.values()), by_name, by_module)


def _label_of(program: Program, product: Product, also: Collection[str]) -> Label | None:
    """The units on what a product reads; None where nobody asks."""
    label = program.value_label(product.data, product.dim)
    if label is None and product.name in also:
        size = program.shapes[product.data.value][product.dim]
        return np.zeros((size, 1), dtype=np.int64)  # nothing there can go
    return label


def _describe(
    site: Site, products: Sequence[Product], flow: Dataflow, shape: tuple[int, ...]
) -> None:
    """Say how a weight of that shape is read."""
    shapes = flow.program.shapes
    windows = {window_of(p.node.args, shapes[p.weight.value]) for p in products}
    dims = {_summed_dim(flow, product, shape) for product in products}
    site.window, site.readings = next(iter(windows)), len(products)
    site.dim = dims.pop() if len(dims) == len(windows) == 1 else None


def _summed_dim(flow: Dataflow, product: Product, shape: tuple[int, ...]) -> int | None:
    """Which dim of a named weight is summed over; None if it is not read as a whole."""
    value, shapes = product.weight.value, flow.program.shapes
    if "groups" in product.node.args:
        return int(not product.node.args["transposed"]) if shapes[value] == shape else None
    if len(shape) != 2 or sorted(shapes[value]) != sorted(shape) or product.node.effect is None:
        return None
    (dim,) = {dim for (name, *_), dim in product.node.effect.contracted
              if product.node.args[str(name)] == product.weight}  # fmt: skip
    turned = _turned(flow, value)
    return None if turned is None else dim ^ turned


def _turned(flow: Dataflow, value: int) -> bool | None:
    """Whether a view shows a stored matrix transposed; None if it shows a part of it."""
    turned = False
    while value not in flow.program.state:
        node = flow.maker[value]
        (before, *_) = read_by(node)
        if name_of(node) in ("t", "transpose", "numpy_T") or node.args.get("dims") == [1, 0]:
            turned = not turned
        elif not is_view(node) or flow.program.shapes[before] != flow.program.shapes[value]:
            return None
        value = before
    return turned


class _Identity:
    """Tells values of a program apart: two views of one tensor taken alike are one value."""

    def __init__(self, program: Program) -> None:
        self._keys: dict[int, Any] = {}
        self._roots: dict[int, int] = {}
        self._epochs: list[tuple[int, int]] = []
        for index, node in enumerate(program.nodes):
            if not is_view(node):
                continue
            value = read_by(node)[0]
            root = self._roots.get(value, value)
            for place, number in enumerate(node.outputs):
                self._roots[number] = root
                if node.target._schema.is_mutable:
                    self._epochs.append((index, root))
                else:
                    said = [(name, self._said(value)) for name, value in node.args.items()]
                    self._keys[number] = (str(node.target), place, *said)
        self._index = {node: index for index, node in enumerate(program.nodes)}

    def of(self, node: Node, value: int) -> Any:
        """What a node reads as that value: equal for equal content."""
        root = self._roots.get(value, value)
        before = self._index[node]
        changes = sum(index < before and other == root for index, other in self._epochs)
        return (self._keys.get(value, value), changes)

    def _said(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._keys.get(value.value, value)
        if isinstance(value, (list, tuple)):
            return tuple(self._said(item) for item in value)
        return value


class Read(NamedTuple):
    """A product that runs: what it reads, by what, its arguments, and whether data are first."""

    data: Tensor
    weight: Tensor
    bound: Mapping[str, Any]
    first: bool

    def rows(self) -> Tensor:
        """The activations as ``(vectors, positions)``."""
        dim = self.dim
        return self.data.movedim(dim, -1).reshape(-1, self.data.shape[dim])

    @property
    def dim(self) -> int:
        """Of the activations, which is summed over."""
        return 1 if "groups" in self.bound else _contracted_in(self.data, first=self.first)

    def columns(self, window: Window, first: int, positions: int) -> Iterator[Tensor]:
        """What is read at once, part by part, shape ``(groups, rows, columns)``.

        ``first`` is the number of the first sample, ``positions`` how many of an image count.
        """
        if window.kernel:
            return columns_of(self.data, window, first=first, limit=positions)
        return iter(self.rows()[None].split(_ROWS, 1))

    def weigh(self, size: int) -> NDArray[np.float64]:
        """Σ W² of the weights that read each of ``size`` positions."""
        weight = self.weight.cpu() if self.weight.device.type == "mps" else self.weight
        squares = weight.double().square()
        if "groups" not in self.bound:
            dim = _contracted_in(squares, first=not self.first)
            sums = squares.movedim(dim, -1).reshape(-1, squares.shape[dim]).sum(0)
        elif self.bound["transposed"]:
            sums = squares.flatten(1).sum(1)
        else:  # weight (out, in / groups, *kernel): the outputs of a group read its inputs alone
            groups = self.bound["groups"]
            blocks = squares.reshape(groups, -1, squares.shape[1], squares[0, 0].numel())
            sums = blocks.sum((1, 3)).flatten()
        if len(sums) != size:
            raise AssertionError(f"{len(sums)} weights for {size} positions")
        return np.asarray(sums.cpu().numpy())


def _contracted_in(operand: Tensor, *, first: bool) -> int:
    """Which dim of a factor of a matrix product is summed over."""
    return operand.dim() - (1 if first or operand.dim() == 1 else 2)


class Watch(TorchDispatchMode):
    """Calls ``hear`` with every site that is about to read, and what it reads.

    Parameters
    ----------
    state
        The model's tensors by name.
    stack
        The path of the running module is on top.
    """

    def __init__(
        self,
        sites: Sites,
        state: Mapping[str, Tensor],
        stack: list[str],
        hear: Callable[[Site, Read, tuple[int, int]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites, self._state, self._stack, self._hear = sites, state, stack, hear
        self._storages = {storage_of(t): n for n, t in state.items() if not t.is_meta}
        self._seen: Counter[tuple[bool, str]] = Counter()

    def begin(self) -> None:
        """Another forward starts."""
        self._seen.clear()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = operand_names(func._schema.name)
        if names is not None:
            self._look(bind(func, args, kwargs), names)
        return func(*args, **kwargs)

    def _look(self, bound: Mapping[str, Any], places: tuple[str, str]) -> None:
        operands = [bound[name] for name in places]
        names = [self._storages.get(storage_of(operand), "") for operand in operands]
        name = names[1] or names[0]
        site = self._site(name)
        if site is None:
            return
        which = 1 if names[0] and not names[1] else 0
        data, weight = operands[which], operands[1 - which]
        start = weight.data_ptr() - self._state[name].data_ptr() if name else 0
        part = (start, weight.numel() if name else 0)  # computed weights lie elsewhere every time
        self._hear(site, Read(data, weight, bound, which == 0), part)

    def _site(self, name: str) -> Site | None:
        """The site of the product that runs, by the name of its weight or the module."""
        expected = self._sites.by_name if name else self._sites.by_module
        place = name or self._stack[-1]
        index = self._seen[bool(name), place]
        self._seen[bool(name), place] += 1
        candidates = expected.get(place, [])
        if len({id(site) for site in candidates}) == 1:
            return candidates[0]
        return candidates[index] if index < len(candidates) else None


def storage_of(tensor: Any) -> int:
    """Where the memory of a tensor begins; 0 for one that has none of its own."""
    return int(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else 0
