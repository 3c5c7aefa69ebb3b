"""Whether removing each group alone moves the outputs: else a comparison says nothing of it.

One backward pass tells it of most groups at once: every contraction over a unit reads it through
a gate, and the gradient of the outputs by the gates is, to first order, what removal does.  Only
the groups of which that says too little are removed, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from prunus.errors import PrunusError
from prunus.graph.axis import Mask
from prunus.graph.groups import Group
from prunus.tracer.dataflow import Dataflow
from prunus.tracer.renormalised import find_renormalised, names_of
from prunus.verifier.case import Case, tolerance
from prunus.verifier.permutation import relative_error
from prunus.verifier.replay import Alter, Replay

MOVED = 1e-3
"""Removing a group has to move the output by this much, or the comparison verifies nothing."""

CLEAR = 5.0
"""A first-order effect of this many times MOVED is enough; below, the group is removed alone."""

FEW = 4
"""Up to so many groups are removed one by one, which takes no longer."""


def each_alone(case: Case) -> dict[str, float]:
    """By touched group: how far its removal alone moves the outputs, to first order if clear."""
    open_gates(case)
    moved = {group.name: _first_order(case, group) for group in case.touched}
    doubtful = [group for group in case.touched if not moved[group.name]]
    choices = [_removing(case, [group]) for group in doubtful]
    for index, outputs in case.replay.run_each(choices):
        moved[doubtful[index].name] = relative_error(case.dense, outputs)
    return moved


def pays(case: Case) -> bool:
    """Whether one gated run costs less than removing the touched groups one by one."""
    return len(case.touched) > FEW


def open_gates(case: Case) -> None:
    """Run the whole model through gates once, which also gives what it answers, where that pays."""
    if case.gradients is None and pays(case):
        case.gradients, outputs = gradients_of(case.replay)
        if outputs is not None:
            case.dense = outputs


def gradients_of(
    replay: Replay, alter: Alter | None = None
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """By unit, the gradient of the outputs by its gate, (units + 1,), and the outputs.

    Zeros and None where an operator has no derivative.
    """
    try:
        gates, outputs = replay.run_gated(alter)
        gradients = _gradients(gates, outputs)
    except (RuntimeError, NotImplementedError, PrunusError):
        return torch.zeros(replay.unit_count + 1), None
    return gradients, {name: tensor.detach() for name, tensor in outputs.items()}


def _first_order(case: Case, group: Group) -> float:
    """What the gradients say of the units that a group loses; 0 where that is not clear.

    The root of the sum of squares, which is not small by chance, as the change along one direction
    may be.  The sum is next to nothing where the units undo each other.
    """
    if case.gradients is None:
        return 0.0
    removed = case.gradients[torch.as_tensor(group.units[~case.kept[group.units]])]
    size = float(removed.norm())
    return size if size > CLEAR * MOVED and abs(float(removed.sum())) > MOVED / 4 else 0.0


def _gradients(gates: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Of a random projection of the outputs, (units + 1,).

    Divided by the root of the number of elements, and each output by its size: so the change of
    the projection exceeds the relative change of the outputs by chance only.
    """
    generator = torch.Generator().manual_seed(0)
    reached = [t for t in outputs.values() if t.requires_grad and t.numel()]
    if not reached:
        return torch.zeros(len(gates))
    directions = []
    for tensor in reached:
        finite = tensor.detach().isfinite()
        scale = tensor.detach().abs().where(finite, 0).max().clamp_min(1e-30)
        random = torch.randn(tensor.shape, generator=generator).to(tensor)
        size = (tensor.numel() * len(reached)) ** 0.5
        directions.append((random / (scale * size)).where(finite, 0))
    (gradient,) = torch.autograd.grad(reached, gates, directions)
    return gradient.nan_to_num()


MEASURED_ALONE = 6
"""Of more groups the distance is measured once, with all of them removed."""


def renormalised_groups(case: Case) -> dict[str, float]:
    """By touched group whose removal changes kept weights: the relative distance of the outputs.

    That is between the masked original, in which weights computed from weights are those of the
    kept entries, and plain silencing, in which they stay as they are.
    """
    found = find_renormalised(Dataflow(case.graph.program))
    if found is None:
        return {}
    named = names_of(found, case.graph.groups)
    touched = [group for group in case.touched if group.name in named]
    plain = case.replay_of(replace(case.graph, program=found.plain))
    sets = [touched] if len(touched) > MEASURED_ALONE else [[group] for group in touched]
    distances: dict[str, float] = {}
    for groups in sets:
        kept = _removing(case, groups)
        distance = relative_error(plain.run(kept), case.replay.run(kept))
        distances |= dict.fromkeys([group.name for group in groups], distance)
    return {name: by for name, by in distances.items() if by > tolerance(case.dtype)}


def _removing(case: Case, groups: Iterable[Group]) -> Mask:
    """What the plan keeps of these groups, and all of the others."""
    kept = case.graph.all_kept
    for group in groups:
        kept[group.units] = case.kept[group.units]
    return kept
