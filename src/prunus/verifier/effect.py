"""Whether removing each group alone moves the outputs: else a comparison says nothing of it.

One backward pass tells it of most groups at once: every contraction over a unit reads it through
a gate, and the gradient of the outputs by the gates is, to first order, what removal does.  Only
the groups of which that says too little are removed, one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import PrunusError
from prunus.verifier.case import Case
from prunus.verifier.permutation import relative_error

MOVED = 1e-3
"""Removing a group has to move the output by this much, or the comparison verifies nothing."""

CLEAR = 5.0
"""A first-order effect of this many times MOVED is enough; below, the group is removed alone.

Where this was doubtful, removal was seen to move the outputs by 1.4 to 48 times
the first-order effect.
"""

FEW = 4
"""Up to so many groups are removed one by one, which takes no longer."""

PROJECTIONS = 3
"""Directions in the outputs along which the gradient is taken; one may miss what moved."""


def each_alone(case: Case) -> dict[str, float]:
    """By touched group: how far its removal alone moves the outputs, to first order if clear."""
    open_gates(case)
    clear = _first_order(case)
    touched = case.touched
    moved: dict[str, float] = {}
    for group in touched:
        moved[group.name] = clear.get(group.name, 0.0)
        if not moved[group.name] > CLEAR * MOVED:
            alone = case.graph.all_kept
            alone[group.units] = case.kept[group.units]
            moved[group.name] = relative_error(case.dense, case.replay.run(alone))
    return moved


def open_gates(case: Case) -> None:
    """Run the whole model through gates once, which also gives what it answers, where that pays."""
    if case.gradients is None and len(case.touched) > FEW:
        try:
            gates, outputs = case.replay.run_gated()
            case.dense = {name: tensor.detach() for name, tensor in outputs.items()}
            case.gradients = _gradients(case, gates, outputs)
        except (RuntimeError, NotImplementedError, PrunusError):  # an operator has no derivative
            case.gradients = torch.zeros(PROJECTIONS, case.graph.unit_count + 1)


def _first_order(case: Case) -> dict[str, float]:
    """What the gradients say, by group.

    The measure never exceeds the relative change of the outputs by more than chance: it is the
    change along a random direction, divided by the root of the number of elements.
    """
    return {} if case.gradients is None else _changes(case, case.gradients)


def _changes(case: Case, gradients: Tensor) -> dict[str, float]:
    """By touched group: the sum over its removed units, along the direction where it is largest."""
    found: dict[str, float] = {}
    for group in case.touched:
        gone = group.units[~case.kept[group.units]]
        found[group.name] = float(gradients[:, torch.as_tensor(gone)].sum(1).abs().max())
    return found


def _gradients(case: Case, gates: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Of random projections of the outputs, scaled to their size; (projections, units + 1)."""
    generator = torch.Generator().manual_seed(0)
    reached = [t for t in outputs.values() if t.requires_grad and t.numel()]
    found = torch.zeros(PROJECTIONS, len(gates))
    for index in range(PROJECTIONS if reached else 0):
        directions = []
        for tensor in reached:
            finite = tensor.detach().isfinite()
            scale = tensor.detach().abs().where(finite, 0).max().clamp_min(1e-30)
            random = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = (tensor.numel() * len(reached)) ** 0.5
            directions.append((random / (scale * size)).where(finite, 0))
        (gradient,) = torch.autograd.grad(
            reached, gates, directions, retain_graph=index + 1 < PROJECTIONS
        )
        found[index] = gradient.nan_to_num()
        if min(_changes(case, found).values(), default=0.0) > CLEAR * MOVED:
            break
    return found
