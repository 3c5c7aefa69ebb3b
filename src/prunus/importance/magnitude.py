"""Criteria that read the weights alone: magnitudes, distances, scales of norms, and the control."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.errors import ModelError
from prunus.graph.axis import Axis, Label, Role
from prunus.graph.groups import Group
from prunus.graph.program import Ref
from prunus.importance.registry import Context, Scores, importance

_CHUNK = 1 << 16
"""Elements worked on at a time: in float64 they fill 512 KiB, which a cache holds."""


@importance("l1")
def l1(group: Group, context: Context) -> Scores:
    """Sum of the absolute values of a unit's weights."""
    return _owned(group, context, 1)


@importance("l2")
def l2(group: Group, context: Context) -> Scores:
    """Root of the sum of the squares of a unit's weights."""
    return np.sqrt(_owned(group, context, 2))


def _owned(group: Group, context: Context, power: int) -> Scores:
    """Sum of ``|w| ** power`` over the parameters on all axes of the group, per unit."""
    total = np.zeros(group.size)
    for axis, _ in group.axes:
        if axis.tensor not in context.graph.parameters:
            continue
        key = (f"l{power}", axis)
        if key not in context.sums:
            values = context.tensor(axis.tensor)
            axes = [Axis(axis.tensor, dim) for dim in range(values.dim())]
            axes = [one for one in axes if one in context.graph.labels]
            for one, sums in zip(axes, reduce_axes(axes, values, power), strict=True):
                context.sums[f"l{power}", one] = sums
        total += sum_by_unit(group, context.graph.labels[axis], context.sums[key])
    return total


def sum_by_unit(group: Group, label: Label, values: Scores) -> Scores:
    """Add up a value per position into a value per unit, shape ``(group.size,)``.

    A unit that fills several columns of one position gets its value once.

    >>> group = Group("w[0]", np.array([1, 2]), (), False)
    >>> sum_by_unit(group, np.array([[1, 3], [2, 3], [2, 2]]), np.array([1.0, 10.0, 100.0]))
    array([  1., 110.])
    """
    position, unit = places_of(group, label)
    return np.bincount(unit, weights=values[position], minlength=group.size).astype(np.float64)


def places_of(group: Group, label: Label) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every position that a unit of the group stands on, once, and the unit's index in the group.

    >>> group = Group("w[0]", np.array([1, 2]), (), False)
    >>> [a.tolist() for a in places_of(group, np.array([[1, 3], [2, 3], [2, 2]]))]
    [[0, 1, 2], [0, 1, 1]]
    """
    rows = np.sort(label, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = 0
    index = np.searchsorted(group.units, rows).clip(max=group.size - 1)
    position, column = np.nonzero(group.units[index] == rows)
    return position, index[position, column]


def reduce_axes(axes: Sequence[Axis], values: torch.Tensor, power: int) -> list[Scores]:
    """For each axis of one tensor the sum of ``|w| ** power`` over all other dims, in float64.

    The tensor is read once, a few rows at a time.

    >>> axes = [Axis("w", 0), Axis("w", 1)]
    >>> [s.tolist() for s in reduce_axes(axes, torch.tensor([[1.0, -2.0], [3.0, 0.0]]), 2)]
    [[5.0, 9.0], [10.0, 4.0]]
    """
    totals = [np.zeros(values.shape[axis.dim]) for axis in axes]
    leading = 1 + max((axis.dim for axis in axes), default=0)
    step = max(1, _CHUNK // max(1, values[:1].numel()))
    for start in range(0, values.shape[0], step):
        part = _powers(values[start : start + step], power)
        if values.dim() > leading:
            part = part.flatten(leading).sum(-1)
        for axis, total in zip(axes, totals, strict=True):
            rows = slice(start, start + step) if axis.dim == 0 else slice(None)
            sums = part.movedim(axis.dim, 0).reshape(part.shape[axis.dim], -1).sum(1)
            total[rows] += sums.cpu().numpy()
    for axis, total in zip(axes, totals, strict=True):
        if not np.isfinite(total).all():
            _refuse_non_finite(axis.tensor, values)
    return totals


def _powers(values: torch.Tensor, power: int) -> torch.Tensor:
    """``|w| ** power`` in float64; the values themselves stay as they are."""
    if values.device.type == "mps":  # which has no float64
        values = values.cpu()
    if values.is_complex() or power == 1:
        values = values.abs()
    wide = values.to(torch.float64, copy=True)
    return wide if power == 1 else wide.square_()


def _refuse_non_finite(name: str, values: torch.Tensor) -> None:
    count = int((~torch.isfinite(values)).sum())
    if count:
        raise ModelError(
            f"{name} has {count} values of {values.numel()} that are NaN or infinite",
            why="a unit with such a weight can't be ranked",
            fix="load a checkpoint that is whole",
        )


_TABLE = 1 << 24
"""Elements of a table of distances that are held at a time: 128 MiB."""


@importance("lamp")
def lamp(group: Group, context: Context) -> Scores:
    """Squared magnitude of a unit over that of all units of its group that are no smaller.

    Lee et al., 2021, with units for single weights: what a group loses is measured against what
    it has left, which makes groups comparable.
    """
    squares = l2(group, context) ** 2
    ordered = np.sort(squares)
    rest = np.cumsum(ordered[::-1])[::-1]
    left = rest[np.searchsorted(ordered, squares)]
    return np.divide(squares, left, out=np.zeros(group.size), where=left > 0)


@importance("fpgm")
def fpgm(group: Group, context: Context) -> Scores:
    """Sum of the distances between a unit's weights and those of every other unit.

    He et al., 2019: a filter near the geometric median can be made up for by the others.  Over
    every tensor that makes the units; for units that are of one size there.
    """
    total = np.zeros(group.size)
    made = False
    for axis, role in group.axes:
        if role is not Role.PRODUCER or axis.tensor not in context.graph.parameters:
            continue
        places = _places(group, context, axis)
        if places is not None:
            made = True
            total += _distances(context.tensor(axis.tensor).movedim(axis.dim, 0), places)
    return total if made else np.full(group.size, np.inf)


def _places(group: Group, context: Context, axis: Axis) -> torch.Tensor | None:
    """Positions of every unit on an axis, shape ``(size, m)``; None if they own unequally many."""
    position, unit = places_of(group, context.graph.labels[axis])
    counts = np.bincount(unit, minlength=group.size)
    if counts.min() != counts.max():
        return None
    return torch.as_tensor(position[np.argsort(unit, kind="stable")].reshape(group.size, -1))


def _distances(rows: torch.Tensor, places: torch.Tensor) -> Scores:
    values = rows.cpu() if rows.device.type == "mps" else rows
    units = values.double()[places.to(values.device)].flatten(1)
    step = max(1, _TABLE // max(1, len(units)))
    parts = [
        torch.cdist(part, units, compute_mode="use_mm_for_euclid_dist").sum(1)
        for part in units.split(step)
    ]
    return np.asarray(torch.cat(parts).cpu().numpy())


@importance("bn_scale")
def bn_scale(group: Group, context: Context) -> Scores:
    """Sum of |γ| of the batch norms that a unit passes (Liu et al., 2017).

    Groups without a batch norm stay whole.
    """
    program = context.graph.program
    scales: set[str] = set()
    for node in program.nodes:
        weight = node.args.get("weight")
        if "batch_norm" in node.target._schema.name and isinstance(weight, Ref):
            scales.add(program.state.get(weight.value, ""))
    total = np.zeros(group.size)
    scaled = False
    for axis, _ in group.axes:
        if axis.tensor in scales:
            scaled = True
            values = context.tensor(axis.tensor).abs().double().cpu().numpy()
            total += sum_by_unit(group, context.graph.labels[axis], values)
    return total if scaled else np.full(group.size, np.inf)


@importance("random")
def random(group: Group, context: Context) -> Scores:
    """Uniform in [0, 1), a function of the seed and the group's name alone."""
    digest = hashlib.sha256(f"{context.seed}:{group.name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype="<u4")).random(group.size)
