"""Ridge least squares: what a whole weight says of dense features, said by the kept features.

With h what a weight W reads in the dense model and g what it reads now (h without the columns that
are removed, or behind layers that were cut and repaired already), S the kept columns and C
covariances,

    W' = W_S + (W C_hg − W_S C_gg)(C_gg + λI)⁻¹,    b' = b + W E h − W' E g

so that λ draws to the dense weights and not to zero.  Where nothing takes up a constant, C are
second moments and b' = b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.calibration.im2col import matrix_of, weight_of
from prunus.calibration.moments import CrossMoments, OwnMoments, Pairing
from prunus.calibration.sites import Site
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Ref
from prunus.tracer.dataflow import Dataflow, contracts, name_of

Place = Literal["bias", "running mean", "new bias", ""]
"""Where a constant goes: into the bias that is there, into the mean that a batch norm subtracts,
into a bias that is made, or nowhere."""

_STANDARD = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
             nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that reads units, as a matrix of outputs by columns.

    Attributes
    ----------
    site
        Where it reads, with what was summed up there.
    dim
        Of the weight: the one that is summed over.
    place, constant
        What can take up a constant of every output: the kind, and the tensor's name.
    """

    site: Site
    dim: int
    place: Place
    constant: str

    @property
    def tensor(self) -> str:
        """Name of the weight."""
        return self.site.tensor


def find_consumers(
    graph: CouplingGraph,
    model: nn.Module,
    sites: Sequence[Site],
    *,
    new_biases: bool,
) -> tuple[list[Consumer], dict[str, str]]:
    """The weights that can be changed, and why the others can't, by name."""
    flow = Dataflow(graph.program)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[Consumer] = []
    left: dict[str, str] = {}
    several = [site.tensor for site in sites]
    for site in sites:
        name, dim = site.tensor, site.dim
        others = [name_of(node) for node in flow.uses(name) if not contracts(node)]
        if not name:
            left[site.module or "the model"] = "its weight is computed from other tensors"
        elif others:
            left[name] = f"{others[0]} reads the weight as well"
        elif several.count(name) > 1:
            left[name] = "it is read in several ways"
        elif dim is None:
            left[name] = "it is no whole matrix or convolution"
        else:
            place, constant = _find_place(graph, modules, flow, name, new_biases=new_biases)
            found.append(Consumer(site, dim, place, constant))
    return found, left


def new_biases_of(consumers: Iterable[Consumer]) -> dict[str, int]:
    """The biases that have to be made for some weights, and their dims of the weight."""
    return {
        consumer.constant: 1 if consumer.site.window.transposed else 0
        for consumer in consumers
        if consumer.place == "new bias"
    }


def _find_place(
    graph: CouplingGraph,
    modules: Mapping[str, nn.Module],
    flow: Dataflow,
    name: str,
    *,
    new_biases: bool,
) -> tuple[Place, str]:
    """What can take up a constant behind a weight."""
    prefix, _, own = name.rpartition(".")
    module, bias = modules[prefix], own.replace("weight", "bias")
    full = ".".join(filter(None, [prefix, bias]))
    tied = _tied(graph, modules, name)
    if any(other is not module for other in tied):
        return "", ""  # two layers share the weight, and may have a bias each
    if bias != own and module._parameters.get(bias) is not None:
        return ("bias", full) if _serves(graph, flow, full, name) else ("", "")
    if mean := _norm_behind(flow, name):
        return "running mean", mean
    takes = new_biases and not tied
    return ("new bias", full) if takes and _takes_bias(module, bias) else ("", "")


def _tied(graph: CouplingGraph, modules: Mapping[str, nn.Module], name: str) -> list[nn.Module]:
    """The modules that hold a weight by its other names."""
    aliases = [alias for alias, first in graph.aliases.items() if first == name]
    return [modules[alias.rpartition(".")[0]] for alias in aliases]


def _serves(graph: CouplingGraph, flow: Dataflow, bias: str, weight: str) -> bool:
    """Whether a bias is a vector that is used with one weight alone."""
    alone = len(flow.uses(bias)) == len(flow.uses(weight)) and bias not in graph.aliases
    return alone and len(graph.shapes[bias]) == 1


def _takes_bias(module: nn.Module, name: str) -> bool:
    """Whether a module that has no bias runs with one of that name."""
    standard = any(type(module).forward is kind.forward for kind in _STANDARD)
    return standard and name == "bias" and getattr(module, "groups", 1) == 1


def _norm_behind(flow: Dataflow, weight: str) -> str:
    """The running mean of the batch norm that alone reads what a weight gives; or nothing."""
    made = [number for node in flow.uses(weight) for number in node.outputs]
    if len(made) != 1 or made[0] in flow.program.outputs.values():
        return ""
    behind = flow.readers.get(made[0], [])
    args = behind[0].args if len(behind) == 1 else {}
    mean = args.get("running_mean")
    if args.get("input") != Ref(made[0]) or not isinstance(mean, Ref):
        return ""
    name = flow.program.state.get(mean.value, "")
    return name if flow.uses(name) == behind else ""


ATTEMPTS = 8
"""Times that the ridge is raised tenfold before the eigenvalues are taken."""

RIDGE = 1e-3
"""Share of the mean variance of the features that is added to each."""

Method = Literal["least_squares", "bias", "sequential"]
"""Fit weights at once, their biases alone, or weights one after the other."""


@dataclass(frozen=True, eq=False)
class Folded:
    """W' of the kept columns, shape ``(outputs, kept)``, and what is added to the bias; float64.

    ``errors`` has, for every output, the variance in the dense model, and the mean squared errors
    right after the cut, with a bias alone, and now; ``ridge`` is λ as it was used.
    """

    weight: Tensor
    shift: Tensor
    errors: Tensor
    ridge: float


def ridge_of(variance: Tensor, share: float, rows: int, columns: int) -> float:
    """λ = share · mean(variance); with fewer rows than columns the share is at least
    ``columns / (10 · rows)``, since so few rows are fitted by chance.

    >>> ridge_of(torch.tensor([1.0, 3.0]), 1e-3, rows=100, columns=2)
    0.002
    >>> ridge_of(torch.tensor([1.0, 3.0]), 1e-3, rows=1, columns=2)
    0.4
    """
    if rows < columns:
        share = max(share, columns / (10 * rows))
    return share * float(variance.mean()) if columns else 0.0


def solve_ridge(matrix: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``right (matrix + λI)⁻¹`` for a symmetric matrix, and the λ that it took.

    Where Cholesky's factorisation fails, λ grows tenfold, and at last the eigenvalues below λ are
    taken for λ.  A matrix of zeros gives zeros: nothing can be learned from what is constant.

    Parameters
    ----------
    matrix, right
        Shapes ``(n, n)`` and ``(m, n)``.
    """
    scale = float(matrix.diagonal().abs().max()) if len(matrix) else 0.0
    if scale == 0:
        return torch.zeros_like(right), ridge
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    ridge = max(ridge, scale * torch.finfo(matrix.dtype).eps)
    for _ in range(ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not bool(failed):
            return torch.cholesky_solve(right.mT, factor).mT, ridge
        ridge *= 10
    values, vectors = torch.linalg.eigh(matrix)
    return (right @ vectors) / (values + ridge).clamp_min(ridge) @ vectors.mT, ridge


def fold(
    weight: Tensor, part: Pairing, *, fixed: bool, share: float, rows: int, method: Method
) -> Folded:
    """Fit what stays of a weight to what all of it says.

    Parameters
    ----------
    weight
        W, shape ``(outputs, columns)``.
    part
        Moments of these columns.
    fixed
        Whether nothing takes up a constant.
    share
        See :func:`ridge_of`.
    rows
        How many feature vectors the moments are of.
    method
        With ``"bias"`` the bias alone takes up the mean of what goes (An et al., 2024).
    """
    stayed, inner = weight[:, part.kept], part.inner
    wanted = weight @ part.cross
    spread = ((weight @ part.dense) * weight).sum(1)
    before, now = weight @ part.means[0], part.means[1]

    def missed(new: Tensor) -> Tensor:
        """Variance of ``new g − W h`` of every output."""
        error = spread - 2 * (wanted * new).sum(1) + ((new @ inner) * new).sum(1)
        return error.clamp_min(0)

    new, ridge = stayed, 0.0
    if method != "bias":
        right, matrix = wanted, inner
        if fixed:  # around zero
            right = wanted + before[:, None] * now
            matrix = inner + now[:, None] * now
        ridge = ridge_of(matrix.diagonal(), share, rows, len(part.kept))
        change, ridge = solve_ridge(matrix, right - stayed @ matrix, ridge)
        new = stayed + change
    shifted, left = missed(stayed), missed(new)
    cut = shifted + (before - stayed @ now).square()
    off = before - new @ now
    if fixed:
        left, off = left + off.square(), torch.zeros_like(off)
    return Folded(new, off, torch.stack([spread, cut, shifted, left]), ridge)


@dataclass(frozen=True)
class Options:
    """What :func:`prunus.recovery.compensate` was called with."""

    method: Method = "least_squares"
    ridge: float = RIDGE
    new_biases: bool = True
    positions: int = 64
    memory_limit: int = 8 << 30


@dataclass(frozen=True)
class Repair:
    """What compensation did to one weight; errors are sums over the outputs that stay.

    They are errors on dense inputs; where it was sequential, on what the cut and repaired layers
    before it give, against the dense outputs on dense inputs.

    Attributes
    ----------
    tensor
        Name of the weight; of two, for a product of queries and keys.
    kept, columns
        Columns (channels × taps) that stay, of how many.
    samples
        Feature vectors that the solution is fitted to.
    ridge
        λ in the units of the features' squares; 0 where no weights were fitted.
    spread
        Variance of the dense outputs.
    cut, shifted, left
        Mean squared error of the outputs right after the cut, with a bias alone, and now.
    place
        What took up the constant part; empty if nothing could.
    exact
        Whether the errors are those on the samples; else products between taps were left out.
    """

    tensor: str
    kept: int
    columns: int
    samples: int
    ridge: float
    spread: float
    cut: float
    shifted: float
    left: float
    place: Place
    exact: bool


@dataclass(frozen=True, eq=False)
class Repaired:
    """New values of a weight, and what to add to its outputs' constant; float64."""

    weight: Tensor
    shift: Tensor
    report: Repair


def refit(
    consumer: Consumer,
    weight: Tensor,
    keep: Mapping[int, Tensor],
    sums: OwnMoments | CrossMoments,
    options: Options = Options(),
) -> Repaired:
    """Fit what is kept of a weight to what all of it says, group by group of a convolution.

    Parameters
    ----------
    weight
        The dense weight, as it is.
    keep
        Positions that are kept, of the weight's dims that lose any.
    sums
        Of what it reads, in the dense model and now.

    Returns
    -------
    Repaired
        The weight has zeros in the columns that are removed.
    """
    window = consumer.site.window
    matrix = matrix_of(weight.detach().to(sums.like), window, consumer.dim)
    groups, outputs, columns = matrix.shape
    there = outputs_that_stay(consumer, weight.shape, keep).to(matrix.device).view(groups, outputs)
    new, shift = torch.zeros_like(matrix), matrix.new_zeros(groups, outputs)
    errors = torch.zeros(4, dtype=torch.float64)
    ridge, kept = 0.0, 0
    fixed = not consumer.place
    for group in there.any(1).nonzero()[:, 0].tolist():
        for part in sums.pairings(group):
            own = matrix[group][:, part.columns]
            found = fold(
                own, part, fixed=fixed, share=options.ridge, rows=sums.count, method=options.method
            )
            new[group][:, part.columns[part.kept]] = found.weight
            shift[group] += found.shift
            ridge, kept = max(ridge, found.ridge), kept + len(part.kept)
            errors += found.errors[:, there[group]].sum(1).cpu()
    spread, cut, shifted, left = errors.tolist()
    sizes = (kept, groups * columns, sums.count)
    missed = (spread, cut, shifted, left)
    report = Repair(*(consumer.tensor, *sizes, ridge, *missed, consumer.place, sums.exact))
    return Repaired(weight_of(new, window, weight.shape, consumer.dim), shift.flatten(), report)


def outputs_that_stay(
    consumer: Consumer, shape: Sequence[int], keep: Mapping[int, Tensor]
) -> Tensor:
    """Whether each output of a weight of that shape is kept, shape ``(outputs,)``."""
    window = consumer.site.window
    dim = 1 - consumer.dim  # of the outputs: of a group, where the convolution is transposed
    groups = window.groups if window.transposed else 1
    there = _marks(shape[dim], keep.get(dim)).expand(groups, -1)
    if groups > 1:  # a group that is removed takes its outputs along
        alive = _marks(shape[consumer.dim], keep.get(consumer.dim)).view(groups, -1)
        there = there & alive.any(1, keepdim=True)
    return there.flatten()


def _marks(size: int, kept: Tensor | None) -> Tensor:
    found = torch.ones(size, dtype=torch.bool)
    if kept is not None:
        found[:] = False
        found[kept] = True
    return found


def shift_constant(constant: Tensor, consumer: Consumer, shift: Tensor) -> None:
    """Add what the outputs lack on the average to their bias, or take it from a norm's mean."""
    sign = -1 if consumer.place == "running mean" else 1
    constant.copy_(constant.double() + sign * shift.to(constant.device))
