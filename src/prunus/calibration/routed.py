"""What routed experts add to a layer, seen while a forward runs.

An expert's last product is the one whose rows are multiplied by a number each: the weight that the
router gives the expert for a token.  Which expert made a row is read off the product, be it grouped
(tokens sorted by expert), batched (weights looked up by index) or one expert's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.calibration.sites import storage_of
from prunus.graph.axis import Axis, Label
from prunus.graph.coupling import CouplingGraph
from prunus.tracer.registry import bind

_PRODUCTS = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2"),
             "_grouped_mm": ("self", "mat2")}  # fmt: skip
_PASSES = {"add", "_to_copy"}


class _Rows(NamedTuple):
    """What experts of one weight made, and for each row the expert's number."""

    values: Tensor
    name: str
    experts: Tensor


class Routed(TorchDispatchMode):
    """Adds up, by unit, the norms of what experts add to tokens, and the number of these tokens.

    Attributes
    ----------
    norms, tokens
        Σ ‖g·f(x)‖ over the tokens routed to an expert, and how many they are; by unit id, shape
        ``(unit_count + 1,)``.
    """

    def __init__(self, graph: CouplingGraph, state: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms, self.tokens = np.zeros((2, graph.unit_count + 1))
        self._labels: dict[str, Label] = {}
        self._state: dict[int, tuple[str, Tensor]] = {}
        for name, shape in graph.shapes.items():
            label = graph.labels.get(Axis(name, 0))
            if len(shape) == 3 and label is not None:
                self._labels[name] = label
                self._state[storage_of(state[name])] = name, state[name]
        self._made: _Rows | None = None
        self._taken: dict[int, _Rows] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "mul" or name in _PASSES or name == "index" or name in _PRODUCTS:
            self._look(name, bind(func, args, kwargs or {}), out)
        return out

    def _look(self, name: str, bound: Mapping[str, Any], out: Tensor) -> None:
        if name in _PRODUCTS:
            found = self._experts(name, bound, out)
            self._made = found or self._made
        elif name == "index":
            self._take(bound, out)
        elif self._made is not None and self._is_made(bound["self"]):
            if name in _PASSES:
                self._made = self._made._replace(values=out)
            elif isinstance(bound["other"], Tensor) and bound["other"].shape[-1:] == (1,):
                self._add(out)

    def _take(self, bound: Mapping[str, Any], out: Tensor) -> None:
        """Weights of experts that are looked up by their numbers."""
        experts = bound["indices"][0]
        if storage_of(bound["self"]) in self._state and experts is not None:
            own, _ = self._state[storage_of(bound["self"])]
            self._taken = {storage_of(out): _Rows(out, own, experts)}

    def _is_made(self, tensor: Tensor) -> bool:
        made = self._made
        return made is not None and storage_of(tensor) == storage_of(made.values)

    def _experts(self, name: str, bound: Mapping[str, Any], out: Tensor) -> _Rows | None:
        """The rows that a product with experts' weights makes; None for another product."""
        for operand in (bound[one] for one in _PRODUCTS[name]):
            if storage_of(operand) in self._taken:
                return self._taken.pop(storage_of(operand))._replace(values=out)
            if storage_of(operand) not in self._state:
                continue
            own, weight = self._state[storage_of(operand)]
            rows = torch.arange(len(out), device=out.device)
            if name == "_grouped_mm":
                ends = bound["offs"].to(rows.dtype)
                return _Rows(out, own, torch.searchsorted(ends, rows, right=True))
            offset = operand.data_ptr() - weight.data_ptr()
            expert = offset // (weight.stride(0) * weight.element_size())
            return _Rows(out, own, torch.full_like(rows, expert))
        return None

    def _add(self, weighted: Tensor) -> None:
        """Rows that were multiplied by the router's weights, (rows, columns)."""
        made = self._made
        assert made is not None
        self._made = None
        norms = weighted.detach().double().flatten(1).norm(dim=1).cpu().numpy()
        label = self._labels[made.name]
        experts = made.experts.flatten().cpu().numpy()
        if len(experts) != len(norms):
            return
        for found, values in ((self.norms, norms), (self.tokens, None)):
            sums = np.bincount(experts, values, len(label)).astype(np.float64)[: len(label)]
            for column in label.T:
                np.add.at(found, column, sums)
