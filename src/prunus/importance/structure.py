"""Criteria that look at the weights of a group's units side by side."""

from __future__ import annotations

import numpy as np
import torch

from prunus.graph.axis import Axis, Role
from prunus.graph.groups import Group
from prunus.graph.program import Ref
from prunus.importance.magnitude import l2, places_of, sum_by_unit
from prunus.importance.registry import Context, Scores, importance

_CHUNK = 1 << 24
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
    step = max(1, _CHUNK // max(1, len(units)))
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
