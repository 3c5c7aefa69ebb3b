"""Sums of weight × gradient over all that a unit owns: what a first-order criterion is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor

from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import CouplingGraph

Sums = NDArray[np.float64]


class Contributions:
    """Turns weights and their gradients into sums per unit.

    Attributes
    ----------
    names
        The parameters that hold units, by their first names: the gradients that are needed.
    """

    def __init__(self, graph: CouplingGraph) -> None:
        self._shapes = graph.shapes
        self._dims: dict[str, list[int]] = {}
        for axis in graph.labels:
            if axis.tensor in graph.parameters:
                self._dims.setdefault(axis.tensor, []).append(axis.dim)
        self.names = tuple(self._dims)
        axes = [Axis(name, dim) for name, dims in self._dims.items() for dim in dims]
        self._all = incidence([graph.labels[axis] for axis in axes], graph.unit_count)
        sizes = [len(graph.labels[axis]) for axis in axes]
        self._gates = self._all.copy()
        reading = self._at(axes, sizes, graph, Role.CONSUMER)
        read = np.asarray(self._all @ reading.astype(np.float64)) > 0
        making = self._at(axes, sizes, graph, Role.PRODUCER)
        rows = np.repeat(np.arange(self._all.shape[0]), np.diff(self._all.indptr))
        columns = self._all.indices
        self._gates.data = np.where(read[rows], reading[columns], making[columns]).astype(float)

    @staticmethod
    def _at(
        axes: Sequence[Axis], sizes: Sequence[int], graph: CouplingGraph, role: Role
    ) -> NDArray[np.bool_]:
        """Which positions lie on axes of a role."""
        found = [np.full(n, graph.roles[axis] is role) for axis, n in zip(axes, sizes, strict=True)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.bool_)

    def reduce(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
    ) -> tuple[Sums, Sums]:
        """Per position of every axis: Σ w·g and Σ (w·g)² over the tensor's other dims.

        A parameter without gradient counts as zeros.
        """
        plain: list[Tensor] = []
        squared: list[Tensor] = []
        for name, dims in self._dims.items():
            gradient = gradients.get(name)
            if gradient is None:
                zeros = [torch.zeros(self._shapes[name][dim], dtype=torch.float64) for dim in dims]
                plain += zeros
                squared += zeros
                continue
            weight = weights[name].detach()
            if weight.device.type == "mps":  # which has no float64
                weight, gradient = weight.cpu(), gradient.cpu()
            exact = torch.promote_types(weight.dtype, torch.float32)
            product = weight.to(exact) * gradient.to(exact)
            plain += _project(product, dims)
            squared += _project(product.square(), dims)
        return _join(plain), _join(squared)

    def owned(self, sums: Sums) -> Sums:
        """Sums over every position that a unit owns, shape ``(units + 1,)``."""
        return np.asarray(self._all @ sums)

    def gated(self, sums: Sums) -> Sums:
        """Sums over the positions where a unit is read.

        Of Σ w·∂L/∂w that is ∂L/∂ξ, with ξ = 1 a factor on the unit in the input of everything
        that reads it, since ``W h = Σ_j W_j h_j`` is linear in each.  Where no weights read a
        unit (dims of queries and keys) it is the sum over the weights that make it.
        """
        return np.asarray(self._gates @ sums)


def _project(product: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Sums over all dims but one, for each of ``dims``, in float64."""
    last = 1 + max(dims)
    if product.dim() > last:
        product = product.flatten(last).sum(-1, dtype=torch.float64)
    found = []
    for dim in dims:
        others = [other for other in range(product.dim()) if other != dim]
        found.append(product.sum(others, dtype=torch.float64) if others else product.double())
    return found


def _join(parts: Sequence[Tensor]) -> Sums:
    """One array; one transfer for each device."""
    if not parts:
        return np.zeros(0)
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return np.asarray(torch.cat(list(parts)).cpu().numpy(), dtype=np.float64)


def incidence(labels: Sequence[Label], units: int) -> csr_matrix:
    """Which unit stands on which position, shape ``(units + 1, Σ n)``.

    A unit that fills several columns of one position is there once; row 0, of the unit that
    stays, is empty.

    >>> label = np.array([[1, 1], [2, 1], [0, 2]])
    >>> incidence([label], 2).toarray()
    array([[0., 0., 0.],
           [1., 1., 0.],
           [0., 1., 1.]])
    """
    rows, columns, start = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for label in labels:
        own = np.sort(label, axis=1)
        own[:, 1:][own[:, 1:] == own[:, :-1]] = 0
        position, column = np.nonzero(own)
        rows.append(own[position, column])
        columns.append(position + start)
        start += len(label)
    at = (np.concatenate(rows), np.concatenate(columns))
    entries = np.ones(len(at[0]))
    return coo_matrix((entries, at), shape=(units + 1, start)).tocsr()
