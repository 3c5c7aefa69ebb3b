"""Another basis for the dims of heads, in which the dims that are removed are missed least.

Queries and keys, like values and the weight that reads the answer, share a basis of their dims;
any other gives the same answer.

*Queries and keys.*  With ``Q = E q qᵀ`` and ``K = E k kᵀ`` of a head, and
``Q^½ K^½ = R s Tᵀ``,

    W_q' = (Q^-½ R_r s_r^½)ᵀ W_q,    W_k' = (K^-½ T_r s_r^½)ᵀ W_k

for r dims (Eckart & Young, 1936), and the products miss ``Σ_{i>r} s_i²`` on the average over all
pairs of a query and a key.  A softmax over the keys doesn't see what all keys have in common, so
that ``K`` is their covariance, unless scores are bent before it.  Queries that share a head of
keys count together.

*Values.*  With ``a`` what the weight W reads of a head, ``M`` the covariance of ``a`` and
``(WᵀW)^½ M^½ = R s Tᵀ``, the basis ``B = M^½ T`` has the dims in the order of how much the
answer misses without them: ``v' = B⁻¹ v`` and ``W' = W B``.  (Columns of B may have any length,
and have length one.)  The model is the same in it; the cut takes the last dims, and least squares
then fold them into what is kept of all heads.

With half of the dims of every head removed from timm's ``vit_tiny``, as in
``benchmarks/accuracy/repairs.py``, the outputs are off by 0.31 with both, 0.35 without the first,
0.46 without the second, and 0.48 without either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.calibration.moments import Moments
from prunus.calibration.sites import Site
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.recovery.attention_rows import (
    Projection,
    ScoreProduct,
    ValuePath,
    find_products,
    find_values,
    pairs_of,
    stays,
)
from prunus.recovery.least_squares import Repair

_FLOOR = 1e-9
"""Eigenvalues below this part of the largest one are taken for it."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """Outputs of a weight that become sums of its outputs.

    Attributes
    ----------
    tensor, dim
        Name of a weight or bias, and its dim of outputs.
    sources, targets
        Outputs that are summed up, shape ``(d,)``, and those that are written, ``(r,)``.
    matrix
        Float64 of shape ``(d, r)``.
    """

    tensor: str
    dim: int
    sources: Tensor
    targets: Tensor
    matrix: Tensor

    def apply(self, values: Tensor) -> None:
        """Write the sums into a tensor."""
        read = values.index_select(self.dim, self.sources.to(values.device)).double()
        mixed = torch.tensordot(read, self.matrix.to(values.device), dims=([self.dim], [0]))
        mixed = mixed.movedim(-1, self.dim).to(values.dtype)
        values.index_copy_(self.dim, self.targets.to(values.device), mixed)


@dataclass(frozen=True, eq=False)
class Mixed:
    """What becomes of one product: sums of outputs, and the report."""

    mixings: tuple[Mixing, ...]
    report: Repair


def mix_products(
    graph: CouplingGraph, plan: Plan, kept: Mask, state: Mapping[str, Tensor], sites: Sequence[Site]
) -> tuple[list[Mixed], dict[str, str]]:
    """New queries and keys for every product that loses dims; and why others have none.

    Parameters
    ----------
    plan, kept
        What goes, and the units of the graph that stay.
    state
        The dense model's tensors.
    sites
        Places with second moments: of what the projections read.
    """
    products, unknown = find_products(graph, kept)
    moments = _whole_moments(sites)
    found: list[Mixed] = []
    left: dict[str, str] = {}
    for product in products:
        if not _loses_dims(product, plan):
            continue
        why = _why_not(product, plan, moments)
        if why:
            left[product.name] = why
        else:
            found.append(_mix(product, plan, state, moments))
    return found, left | unknown


def best_products(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A_q`` and ``A_k``, shape ``(d, count)``, and the squares of all singular values.

    ``q' = A_qᵀ q`` and ``k' = A_kᵀ k`` have products as near to ``q·k`` as so few dims allow.

    Parameters
    ----------
    queries, keys
        Second moments, symmetric, float64 of shape ``(d, d)``.

    >>> q, k = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.eye(2).double()
    >>> a, b, squares = best_products(q, k, 1)
    >>> (a @ b.mT).abs().round(decimals=6).tolist(), squares.tolist()
    ([[1.0, 0.0], [0.0, 0.0]], [4.0, 1.0])
    """
    (q_half, q_back), (k_half, k_back) = roots(queries), roots(keys)
    left, values, right = torch.linalg.svd(q_half @ k_half)
    scale = values[:count].sqrt()
    return (
        q_back @ left[:, :count] * scale,
        k_back @ right.mT[:, :count] * scale,
        values.square(),
    )


def roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``M^½`` and ``M^-½``; small eigenvalues are raised."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = max(float(values.max()) * _FLOOR, torch.finfo(values.dtype).tiny)
    roots = values.clamp_min(floor).sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT


def _stay(plan: Plan, side: Projection, rows: Tensor) -> Tensor:
    return stays(rows, plan, side.weight, side.dim)


def _loses_dims(product: ScoreProduct, plan: Plan) -> bool:
    """Whether a head that stays loses some of its dims."""
    stay = _stay(plan, product.keys, product.keys.rows)
    return bool((stay.any(1) & ~stay.all(1)).any())


def _why_not(product: ScoreProduct, plan: Plan, moments: Mapping[str, Moments]) -> str:
    """Why queries and keys can't take another basis; empty if they can."""
    for side in (product.queries, product.keys):
        if side.weight not in moments:
            return f"there are no second moments of what {side.weight} reads"
    for queries, keys in pairs_of(product):
        stay = _stay(plan, product.keys, keys)
        if not bool((_stay(plan, product.queries, queries) == stay).all()):
            return "its queries lose other dims than its keys"
    return ""


def _mix(
    product: ScoreProduct, plan: Plan, state: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> Mixed:
    mixings: list[Mixing] = []
    whole = cut = left = 0.0
    columns = stayed = 0
    for queries, keys in pairs_of(product):
        stay = _stay(plan, product.keys, keys).nonzero()[:, 0]
        columns, stayed = columns + len(keys), stayed + len(stay)
        if not len(stay):
            continue
        of_queries = torch.stack([
            _second(product.queries, rows, state, moments, centred=False) for rows in queries
        ]).sum(0)  # fmt: skip
        of_keys = _second(product.keys, keys, state, moments, centred=product.shiftless)
        first, second, squares = best_products(of_queries, of_keys, len(stay))
        missing = [n for n in range(len(keys)) if n not in set(stay.tolist())]
        whole += float(squares.sum())
        left += float(squares[len(stay) :].sum())
        cut += float((of_queries[missing][:, missing] * of_keys[missing][:, missing]).sum())
        for rows in queries:
            mixings += _mixings(product.queries, rows, stay, first)
        mixings += _mixings(product.keys, keys, stay, second)
    samples = min(moments[side.weight].count for side in (product.queries, product.keys))
    report = Repair(
        product.name, stayed, columns, samples, 0.0, whole, cut, cut, left, "", exact=False
    )
    return Mixed(tuple(mixings), report)


def _mixings(side: Projection, rows: Tensor, stay: Tensor, matrix: Tensor) -> list[Mixing]:
    found = [Mixing(side.weight, side.dim, rows, rows[stay], matrix.cpu())]
    return found + ([Mixing(side.bias, 0, rows, rows[stay], matrix.cpu())] if side.bias else [])


def _second(
    side: Projection,
    rows: Tensor,
    state: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    *,
    centred: bool,
) -> Tensor:
    """``E y yᵀ`` of some outputs, or their covariance, from the moments of what is read."""
    known = moments[side.weight]
    weight = state[side.weight].detach().to(known.total).movedim(side.dim, 0)
    weight = weight[rows.to(weight.device)]
    spread = weight @ known.covariance()[0, 0] @ weight.mT
    if centred:
        return spread
    mean = weight @ known.mean[0]
    if side.bias:
        mean = mean + state[side.bias].detach().to(mean)[rows.to(mean.device)]
    return spread + mean[:, None] * mean


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
    whole = _whole_moments(sites)
    changed: dict[str, Tensor] = {}
    rotated: dict[str, Moments] = {}
    for path in find_values(graph):
        bases = _bases(path, plan, state, whole[path.weight]) if path.weight in whole else {}
        if bases:
            names = filter(None, [path.values.weight, path.values.bias, path.weight])
            changed |= {name: state[name].detach().clone() for name in names}
            rotated[path.weight] = _turned(whole[path.weight], path, bases)
        for head, basis in bases.items():
            for mixing in _turns(path, head, basis):
                mixing.apply(changed[mixing.tensor])
    found = [copy.copy(site) for site in sites]
    for site in found:
        site.moments = rotated.get(site.tensor, site.moments)
    return Turned(changed, tuple(found))


def _whole_moments(sites: Sequence[Site]) -> dict[str, Moments]:
    """Second moments of what weights read, where all products were summed up, by the weight."""
    found = {site.tensor: site.moments for site in sites if site.moments is not None}
    return {name: one for name, one in found.items() if one.blocks == one.groups == 1}


def _bases(
    path: ValuePath, plan: Plan, state: Mapping[str, Tensor], moments: Moments
) -> dict[int, Tensor]:
    """For every head that loses some of its dims B, its dims that stay where those of S are."""
    covariance = moments.covariance()[0, 0]
    weight = state[path.weight].detach().to(covariance).movedim(path.dim, 1)
    found: dict[int, Tensor] = {}
    for head, rows in enumerate(path.values.rows):
        stay = stays(rows, plan, path.values.weight, path.values.dim)
        read = [(c, stays(c, plan, path.weight, path.dim)) for c in path.columns[head]]
        columns = [c for c, there in read if bool(there.any())]
        alike = all(bool((there == stay).all()) for _, there in read if bool(there.any()))
        if columns and alike and not bool(stay.all()):
            found[head] = _basis(covariance, weight, columns, stay).cpu()
    return found


def _basis(covariance: Tensor, weight: Tensor, columns: Sequence[Tensor], stay: Tensor) -> Tensor:
    """B of one head, which several readers may read."""
    spread = torch.stack([covariance[c][:, c] for c in columns]).sum(0)
    gram = torch.stack([weight[:, c].mT @ weight[:, c] for c in columns]).sum(0)
    half, _ = roots(spread)
    right = torch.linalg.svd(roots(gram)[0] @ half)[2].mT
    order = torch.cat([stay.nonzero()[:, 0], (~stay).nonzero()[:, 0]])
    basis = torch.empty_like(half)
    sorted_by_loss = half @ right
    basis[:, order.to(half.device)] = sorted_by_loss / sorted_by_loss.norm(dim=0)
    return basis


def _turns(path: ValuePath, head: int, basis: Tensor) -> list[Mixing]:
    """``v' = B⁻¹ v``, and for every reader ``W' = W B``."""
    side: Projection = path.values
    rows, back = side.rows[head], torch.linalg.inv(basis).mT
    found = [Mixing(side.weight, side.dim, rows, rows, back)]
    if side.bias:
        found.append(Mixing(side.bias, 0, rows, rows, back))
    return found + [Mixing(path.weight, path.dim, c, c, basis) for c in path.columns[head]]


def _turned(moments: Moments, path: ValuePath, bases: Mapping[int, Tensor]) -> Moments:
    """Moments of what the weight reads in the other bases."""
    matrix = torch.eye(moments.columns, dtype=torch.float64)
    for head, basis in bases.items():
        for columns in path.columns[head]:
            matrix[columns[:, None], columns] = torch.linalg.inv(basis)
    matrix = matrix.to(moments.total.device)
    mean = moments.mean @ matrix.mT
    spread = matrix @ moments.covariance() @ matrix.mT
    return replace(
        moments, shift=mean, total=torch.zeros_like(mean), product=spread * moments.count
    )
