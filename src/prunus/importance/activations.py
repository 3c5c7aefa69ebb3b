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

from prunus.errors import DataError
from prunus.graph.axis import Label
from prunus.importance.confidence import Confidence
from prunus.tracer.program import Node, Program, Ref
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
    weight
        Σ W² of the weights that read each position, shape ``(n,)``.
    """

    tensor: str
    module: str
    label: Label = field(repr=False)
    count: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    weight: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)

    def __post_init__(self) -> None:
        for name in ("total", "square", "weight"):
            setattr(self, name, np.zeros(len(self.label)))

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
    """Sums up what is read, in ``sites``, and how sure attention is, in ``confidence``.

    Parameters
    ----------
    program
        What ran when the model was traced.
    state
        The model's tensors by name.
    stack
        The path of the running module is on top.
    inputs, attention
        Which of the two to look at.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        stack: list[str],
        *,
        inputs: bool,
        attention: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stack = stack
        self._inputs = inputs
        self.confidence = Confidence(program) if attention else None
        self._storages = {_storage(t): n for n, t in state.items() if not t.is_meta}
        self._by_name: dict[str, list[Site | None]] = {}
        self._by_module: dict[str, list[Site | None]] = {}
        self._seen: Counter[str] = Counter()
        self._weighed: set[tuple[int, ...]] = set()
        self.sites: list[Site] = []
        if inputs:
            self._expect(program)

    def begin(self) -> None:
        """Another forward starts."""
        self._seen.clear()
        if self.confidence is not None:
            self.confidence.begin()

    def _expect(self, program: Program) -> None:
        """The sites of the recorded program, by weight or by module."""
        origins, derived = _origins(program)
        merged: dict[tuple[str, bytes], Site] = {}
        for node in program.nodes:
            operands = _operands(node)
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
                if label is not None:
                    key = (name or f"/{node.module}/{len(merged)}", label.tobytes())
                    site = merged.setdefault(key, Site(name, node.module, label))
            if name:
                self._by_name.setdefault(name, []).append(site)
            else:
                self._by_module.setdefault(node.module, []).append(site)
        self.sites = list(merged.values())

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.confidence is not None:
            self.confidence.look(self._stack[-1], func, args, kwargs, out)
        places = _CONTRACTIONS.get(func._schema.name) if self._inputs else None
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
        _add(site, _rows(data, bound, first=which == 0))
        key = (weight.data_ptr(), weight.numel(), id(site))
        if name and key in self._weighed:
            return
        if name or not site.weight.any():
            self._weighed.add(key)
            site.weight += _weigh(weight, bound, first=which == 1, size=len(site.label))


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


def _operands(node: Node) -> list[tuple[str, int]] | None:
    """Names and contracted dims of a recorded product's two operands; None if it is none."""
    places = _CONTRACTIONS.get(node.target._schema.name)
    if places is None or node.effect is None:
        return None
    if not node.effect.contracted:  # depthwise: channels pass
        return None
    dims = {str(name): dim for (name, *_), dim in node.effect.contracted}
    return [(name, dims[name]) for name in places]


def _origins(program: Program) -> tuple[dict[int, str], set[int]]:
    """Values that are views of a named tensor, and values made of named tensors alone."""
    origins = dict(program.state)
    derived = {*program.state, *program.constants}
    for node in program.nodes:
        refs = [ref.value for ref in _refs(list(node.args.values()))]
        if not node.outputs:
            continue
        if refs and all(ref in derived for ref in refs):
            derived.update(node.outputs)
        returns = node.target._schema.returns
        view = bool(returns) and returns[0].alias_info is not None
        if view and refs and refs[0] in origins:
            origins.update(dict.fromkeys(node.outputs, origins[refs[0]]))
    return origins, derived


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (list, tuple)):
        return [ref for item in value for ref in _refs(item)]
    return []


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else 0


def _rows(data: Tensor, bound: Mapping[str, Any], *, first: bool) -> Tensor:
    """The activations as ``(vectors, positions)``."""
    dim = 1 if "groups" in bound else _contracted(data, first=first)
    return data.movedim(dim, -1).reshape(-1, data.shape[dim])


def _contracted(operand: Tensor, *, first: bool) -> int:
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
        raise DataError(
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
        dim = _contracted(squares, first=first)
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
