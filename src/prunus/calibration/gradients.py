"""Gradients of a loss, and the sums of weight × gradient over all that a unit owns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor
from torch.nn import functional as F

from prunus.calibration.batches import labels_of
from prunus.errors import DataError
from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import tensors_of

Loss = Callable[[Any, Any], Tensor]
"""``(output, batch) → scalar``; the batch holds one sample."""

_FIX = "give loss=lambda output, batch: …, which returns a scalar"


def loss_of(
    output: Any, batch: Any, *, loss: Loss | None, kept: Collection[str], seed: int
) -> Tensor:
    """A scalar that depends on the weights, the first of these that there is:

    - what ``loss`` returns;
    - with labels, the model's own ``.loss``, or the cross-entropy of its class scores;
    - of class scores (an output ``logits``, or a single one of two or three dims) the
      cross-entropy towards the model's own largest, averaged over positions (those that an
      ``attention_mask`` hides left out);
    - of other outputs ``Σ ε·y / √n`` with ε drawn from a normal by ``seed``: the expected square
      of its derivative along a direction is how much the outputs move along it (the Fisher
      information of a normal model, Martens, 2020).

    Raises
    ------
    DataError
        If there is no such scalar.
    """
    labels = labels_of(batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return _checked(loss(output, batch))
    if labels is not None and isinstance(own, Tensor):
        return _checked(own)
    outputs = _outputs_in(output, kept)
    scores = _scores_in(outputs)
    if labels is not None:
        first = next(iter(outputs.values()))
        return _checked(_towards(first if scores is None else scores, labels))
    if scores is not None:
        return _checked(_towards_largest(scores, batch))
    return _checked(_towards_noise([*outputs.values()], seed))


def _scores_in(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Class scores: an output ``logits``, or a single one of two or three dims."""
    if "logits" in outputs:
        return outputs["logits"]
    (single, *others) = outputs.values()
    return single if not others and single.dim() in (2, 3) else None


def _outputs_in(output: Any, kept: Collection[str]) -> dict[str, Tensor]:
    """Outputs of fractions by name: those that are kept, if there are any."""
    found = {n: t for n, t in tensors_of(output) if t.is_floating_point() and n != "loss"}
    if not found:
        raise DataError(
            "the model's output has no floating-point tensor",
            why="the criteria that read gradients need something to differentiate",
            fix=_FIX,
        )
    return {name: t for name, t in found.items() if name in kept} or found


def _checked(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        if bool(torch.isfinite(value)):
            return value.sum()
        raise DataError(
            f"the loss of a sample is {value.item()}",
            why="the sample holds NaN or infinite values, or the model makes them",
            fix="clean the data",
        )
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    scalar = isinstance(value, Tensor) and value.numel() == 1
    raise DataError(
        "the loss does not depend on the weights" if scalar else f"the loss is no scalar: {shape}",
        why="it was computed without gradients, or from other tensors" if scalar else "",
        fix=_FIX,
    )


def _towards(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes in the last dim, or in dim 1 as convolutions leave them."""
    labels = labels.to(scores.device)
    if not labels.is_floating_point():
        if labels.shape == scores.shape[:-1]:
            return F.cross_entropy(scores.flatten(0, -2), labels.flatten().long())
        if labels.shape == (*scores.shape[:1], *scores.shape[2:]):
            return F.cross_entropy(scores, labels.long())
    raise DataError(
        f"these labels are no classes: {labels.dtype} of shape {tuple(labels.shape)}",
        why=f"the output has shape {tuple(scores.shape)}",
        fix=f"{_FIX}, or give the inputs alone",
    )


def _towards_largest(scores: Tensor, batch: Any) -> Tensor:
    rows = scores.flatten(0, -2)
    target = rows.detach().argmax(-1)
    seen = batch.get("attention_mask") if isinstance(batch, dict) else None
    if isinstance(seen, Tensor) and seen.shape == scores.shape[:-1] and bool(seen.any()):
        hidden = (seen == 0).flatten().to(target.device)
        target = target.masked_fill(hidden, -100)
    return F.cross_entropy(rows, target)


def _towards_noise(outputs: list[Tensor], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for values in outputs:
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        parts.append((values * noise.to(values)).sum() / max(values.numel(), 1) ** 0.5)
    return torch.stack(parts).sum()


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
