"""Sums over what goes into everything that reads units, taken while the real forward runs.

A dispatch mode sees every product of activations with weights.  The weights say which recorded
operator it is, through the storage that they live in; where weights are computed (a normalised
weight), the module that runs and the order of its operators do.  The recorded operator says
which units stand on the positions that are summed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.calibration.im2col import Window, columns_of
from prunus.calibration.readings import Reading, SecondMoments, share_moments
from prunus.calibration.second_moments import Moments
from prunus.errors import DataError
from prunus.graph.axis import Label
from prunus.graph.program import Node, Program, refs_in
from prunus.tracer.registry import bind

_CHUNK = 1 << 22
"""Elements that are widened to float64 at a time: 32 MiB."""


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
        Mean and second moment of the columns that are read; sites that read the same values share
        one object.  None where they were not wanted.
    """

    tensor: str
    module: str
    label: Label = field(repr=False)
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


class Watch(TorchDispatchMode):
    """Sums up what is read, in ``sites``.

    Parameters
    ----------
    program
        What ran when the model was traced.
    state
        The model's tensors by name.
    stack
        The path of the running module is on top.
    inputs
        Whether sums per position are wanted.
    moments
        Of what to take second moments; of nothing by default.
    shapes
        Of the model's tensors when it was traced, if it was cut since.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        stack: list[str],
        *,
        inputs: bool,
        moments: SecondMoments | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stack = stack
        self._inputs = inputs
        self._moments = moments
        self._first = 0
        self._storages = {_storage(t): n for n, t in state.items() if not t.is_meta}
        self._state = state
        self._by_name: dict[str, list[Site | None]] = {}
        self._by_module: dict[str, list[Site | None]] = {}
        self._seen: Counter[str] = Counter()
        self.sites: list[Site] = []
        self._owners: dict[int, Site] = {}
        if inputs or moments is not None:
            self._expect(program, shapes or {n: tuple(t.shape) for n, t in state.items()})

    def begin(self, first: int = 0) -> None:
        """Another forward starts; its first sample is the one of that number."""
        self._seen.clear()
        self._first = first

    def _expect(self, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The sites of the recorded program, by weight or by module."""
        origins, derived = origins_of(program), derived_of(program)
        merged: dict[tuple[str, bytes], Site] = {}
        readings: dict[int, list[Reading]] = {}
        for node in program.nodes:
            operands = operands_of(node)
            if operands is None:
                continue
            refs = [node.args[name] for name, _ in operands]
            names = [origins.get(ref.value, "") for ref in refs]
            fixed = [ref.value in derived for ref in refs]
            site: Site | None = None
            name = names[1] or names[0]
            if fixed[0] != fixed[1]:
                data, dim = operands[fixed.index(False)]
                label = program.value_label(node.args[data], dim)
                if label is None and self._moments is not None and name in self._moments.also:
                    size = program.shapes[node.args[data].value][dim]
                    label = np.zeros((size, 1), dtype=np.int64)  # nothing there can go
                if label is not None:
                    key = (name or f"/{node.module}/{len(merged)}", label.tobytes())
                    site = merged.setdefault(key, Site(name, node.module, label))
                    which = fixed.index(False)
                    reading = Reading(node, refs[which], refs[1 - which])
                    readings.setdefault(id(site), []).append(reading)
            if name:
                self._by_name.setdefault(name, []).append(site)
            else:
                self._by_module.setdefault(node.module, []).append(site)
        self.sites = list(merged.values())
        if self._moments is not None:
            wholes = {n: shapes[name] for n, name in origins.items() if name in shapes}
            pairs = [(site.tensor, site.label, readings[id(site)]) for site in self.sites]
            found = share_moments(program, pairs, wholes, self._moments)
            for site, (moments, window) in zip(self.sites, found, strict=True):
                site.moments, site.window = moments, window
                if moments is not None:
                    self._owners.setdefault(id(moments), site)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        places = _CONTRACTIONS.get(func._schema.name) if self.sites else None
        if places is not None:
            self._look(bind(func, args, kwargs), places)
        return out

    def _look(self, bound: Mapping[str, Any], places: tuple[str, str]) -> None:
        operands = [bound[name] for name in places]
        names = [self._storages.get(_storage(operand), "") for operand in operands]
        name = names[1] or names[0]
        expected = self._by_name if name else self._by_module
        place = name or self._stack[-1]
        candidates = expected.get(place, [])
        index = self._seen[f"{bool(name)}{place}"]
        self._seen[f"{bool(name)}{place}"] += 1
        alike = len({id(site) for site in candidates}) == 1
        site = candidates[0 if alike else index] if alike or index < len(candidates) else None
        if site is None:
            return
        which = 1 if names[0] and not names[1] else 0
        data, weight = operands[which], operands[1 - which]
        if site.moments is not None and self._owners[id(site.moments)] is site:
            self._take(site, data, bound, first=which == 0)
        if not self._inputs:
            return
        _add(site, rows_of(data, bound, first=which == 0))
        start = weight.data_ptr() - self._state[name].data_ptr() if name else 0
        part = (start, weight.numel() if name else 0)  # computed weights lie elsewhere every time
        if part not in site.weights:
            site.weights[part] = _weigh(weight, bound, first=which == 1, size=len(site.label))

    def _take(self, site: Site, data: Tensor, bound: Mapping[str, Any], *, first: bool) -> None:
        """Add the columns that a product reads to the second moments of its site."""
        moments, options = site.moments, self._moments
        if moments is None or options is None:
            return
        if site.window.kernel:
            parts = columns_of(data, site.window, first=self._first, limit=options.positions)
        else:
            parts = iter(rows_of(data, bound, first=first)[None].split(_ROWS, 1))
        for part in parts:
            moments.add(part)
        if not bool(torch.isfinite(moments.total).all()):
            raise not_finite(site)


_ROWS = 1 << 12
"""Rows whose products are summed up in the type of the activations."""

_CONTRACTIONS = {
    "aten::mm": ("self", "mat2"),
    "aten::bmm": ("self", "mat2"),
    "aten::mv": ("self", "vec"),
    "aten::dot": ("self", "tensor"),
    "aten::addmm": ("mat1", "mat2"),
    "aten::addmv": ("mat", "vec"),
    "aten::baddbmm": ("batch1", "batch2"),
    "aten::_grouped_mm": ("self", "mat2"),
    "aten::convolution": ("input", "weight"),
    "aten::_convolution": ("input", "weight"),
}
"""Products of two operands, by the names of their arguments; other products are not looked at."""


def operands_of(node: Node) -> list[tuple[str, int]] | None:
    """Names and contracted dims of a recorded product's two operands; None if it is none."""
    places = _CONTRACTIONS.get(node.target._schema.name)
    if places is None or node.effect is None:
        return None
    if not node.effect.contracted:  # depthwise: channels pass
        return None
    dims = {str(name): dim for (name, *_), dim in node.effect.contracted}
    return [(name, dims[name]) for name in places]


def origins_of(program: Program) -> dict[int, str]:
    """Value numbers of named tensors and of views of them, with the names."""
    origins = dict(program.state)
    for node in program.nodes:
        refs = refs_in(node.args)
        returns = node.target._schema.returns
        view = bool(returns) and returns[0].alias_info is not None
        if view and refs and refs[0].value in origins:
            origins.update(dict.fromkeys(node.outputs, origins[refs[0].value]))
    return origins


def derived_of(program: Program) -> set[int]:
    """Values that are made of named tensors alone."""
    derived = {*program.state, *program.constants}
    for node in program.nodes:
        refs = refs_in(node.args)
        if refs and all(ref.value in derived for ref in refs):
            derived.update(node.outputs)
    return derived


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else 0


def rows_of(data: Tensor, bound: Mapping[str, Any], *, first: bool) -> Tensor:
    """The activations as ``(vectors, positions)``."""
    dim = 1 if "groups" in bound else contracted_in(data, first=first)
    return data.movedim(dim, -1).reshape(-1, data.shape[dim])


def contracted_in(operand: Tensor, *, first: bool) -> int:
    """Which dim of a factor of a matrix product is summed over."""
    return operand.dim() - (1 if first or operand.dim() == 1 else 2)


def _add(site: Site, rows: Tensor) -> None:
    if rows.device.type == "mps":  # which has no float64
        rows = rows.cpu()
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    site.count += len(rows)
    for part in rows.split(step):
        wide = part.to(torch.float64)
        site.total += wide.sum(0).cpu().numpy()
        site.square += wide.square().sum(0).cpu().numpy()
    if not np.isfinite(site.square).all():
        raise not_finite(site)


def not_finite(site: Site) -> DataError:
    return DataError(
        "activations are NaN or infinite",
        where=f"the input of {site.tensor or site.module}",
        why="the calibration data holds such values, or the model makes them",
        fix="clean the data; for a model in half precision try float32",
    )


def _weigh(
    weight: Tensor, bound: Mapping[str, Any], *, first: bool, size: int
) -> NDArray[np.float64]:
    """Σ W² of the weights that read each of ``size`` positions."""
    squares = (weight.cpu() if weight.device.type == "mps" else weight).double().square()
    if "groups" not in bound:
        dim = contracted_in(squares, first=first)
        sums = squares.movedim(dim, -1).reshape(-1, squares.shape[dim]).sum(0)
    elif bound["transposed"]:
        sums = squares.flatten(1).sum(1)
    else:  # weight (out, in / groups, *kernel): the outputs of a group read its inputs alone
        groups = bound["groups"]
        blocks = squares.reshape(groups, -1, squares.shape[1], squares[0, 0].numel())
        sums = blocks.sum((1, 3)).flatten()
    if len(sums) != size:
        raise AssertionError(f"{len(sums)} weights for {size} positions")
    return np.asarray(sums.cpu().numpy())
