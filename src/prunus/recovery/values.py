"""Another basis for the values of a head, in which what goes is what the answer misses least.

The dims of a head are a basis that values and the weight that reads the answer share; any other
gives the same answer.  With ``a`` what that weight W reads of a head, ``M`` the covariance of ``a``
and ``(WᵀW)^½ M^½ = R s Tᵀ``, the basis ``B = M^½ T`` has them in the order of how much the answer
misses without them: ``v' = B⁻¹ v`` and ``W' = W B``.  (Columns of B may have any length, and have
length one.)  The model is the same in it; the cut takes the last dims, and least squares then fold
them into what stays of all heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.calibration.second_moments import Moments
from prunus.calibration.sites import Site
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.recovery.attention_rows import Projection, ValuePath, find_values, stays
from prunus.recovery.queries_keys import Mixing, roots


@dataclass(frozen=True, eq=False)
class Turned:
    """The dense model in another basis: tensors by name, and what its weights read."""

    state: Mapping[str, Tensor]
    sites: tuple[Site, ...]


def turn_values(
    graph: CouplingGraph, plan: Plan, state: Mapping[str, Tensor], sites: Sequence[Site]
) -> Turned:
    """New values, and the weights that read them, for heads that lose dims of these.

    Parameters
    ----------
    plan
        What goes.
    state
        The dense model's tensors; they are not modified.
    sites
        Places with second moments.
    """
    moments = {site.tensor: site.moments for site in sites if site.moments is not None}
    changed: dict[str, Tensor] = {}
    rotated: dict[str, Moments] = {}
    for path in find_values(graph):
        known = moments.get(path.weight)
        if known is None or known.blocks != 1 or known.groups != 1:
            continue
        bases = _bases(path, plan, state, known)
        if not bases:
            continue
        for name in dict.fromkeys([path.values.weight, path.values.bias, path.weight]):
            if name:
                changed[name] = state[name].detach().clone()
        whole = torch.eye(known.columns, dtype=torch.float64)
        for head, basis in bases.items():
            for mixing in _mixings(path, head, basis):
                mixing.apply(changed[mixing.tensor])
            inverse = torch.linalg.inv(basis)
            for columns in path.columns[head]:
                whole[columns[:, None], columns] = inverse
        rotated[path.weight] = _turned(known, whole.to(known.total.device))
    found = tuple(
        _with_moments(site, rotated[site.tensor]) if site.tensor in rotated else site
        for site in sites
    )
    return Turned(changed, found)


def _with_moments(site: Site, moments: Moments) -> Site:
    made = copy.copy(site)
    made.moments = moments
    return made


def _bases(
    path: ValuePath, plan: Plan, state: Mapping[str, Tensor], moments: Moments
) -> dict[int, Tensor]:
    """For every head that loses some of its dims B, its dims that stay where those of S are."""
    keep = {axis.dim: p for axis, p in plan.keep.items() if axis.tensor == path.values.weight}
    read = {axis.dim: p for axis, p in plan.keep.items() if axis.tensor == path.weight}
    covariance = moments.covariance()[0, 0]
    weight = state[path.weight].detach().to(covariance).movedim(path.dim, 1)
    found: dict[int, Tensor] = {}
    for head, rows in enumerate(path.values.rows):
        stay = stays(rows, keep, path.values.dim)
        columns = [c for c in path.columns[head] if bool(stays(c, read, path.dim).any())]
        if bool(stay.all()) or not columns:
            continue
        if any(not bool((stays(c, read, path.dim) == stay).all()) for c in columns):
            continue
        spread = torch.stack([covariance[c][:, c] for c in columns]).sum(0)
        gram = torch.stack([weight[:, c].mT @ weight[:, c] for c in columns]).sum(0)
        half, _ = roots(spread)
        right = torch.linalg.svd(roots(gram)[0] @ half)[2].mT
        order = torch.cat([stay.nonzero()[:, 0], (~stay).nonzero()[:, 0]])
        basis = torch.empty_like(half)
        sorted_by_loss = half @ right
        basis[:, order.to(half.device)] = sorted_by_loss / sorted_by_loss.norm(dim=0)
        found[head] = basis.cpu()
    return found


def _mixings(path: ValuePath, head: int, basis: Tensor) -> list[Mixing]:
    """``v' = B⁻¹ v``, and for every reader ``W' = W B``."""
    side: Projection = path.values
    rows, back = side.rows[head], torch.linalg.inv(basis).mT
    found = [Mixing(side.weight, side.dim, rows, rows, back)]
    if side.bias:
        found.append(Mixing(side.bias, 0, rows, rows, back))
    return found + [Mixing(path.weight, path.dim, c, c, basis) for c in path.columns[head]]


def _turned(moments: Moments, matrix: Tensor) -> Moments:
    """Moments of ``matrix @ h``."""
    mean = moments.mean @ matrix.mT
    spread = matrix @ moments.covariance() @ matrix.mT
    return replace(
        moments, shift=mean, total=torch.zeros_like(mean), product=spread * moments.count
    )
