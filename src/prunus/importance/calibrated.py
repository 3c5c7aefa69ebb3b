"""Criteria that read calibration data: gradients, activations, attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prunus.calibration.sites import Site
from prunus.graph.groups import Group
from prunus.importance.magnitude import sum_by_unit
from prunus.importance.registry import Context, Scores, importance


@importance("taylor", needs=("gradient",))
def taylor(group: Group, context: Context) -> Scores:
    """Mean over samples of (Σ w·∂L/∂w)², the sum over all weights that a unit owns.

    The squared change of the loss to first order when the unit's weights go to zero (Molchanov et
    al., 2019, eq. 8, with one sample as the batch).
    """
    return _mean(group, context, "gradient_squared")


@importance("fisher", needs=("gradient",))
def fisher(group: Group, context: Context) -> Scores:
    """Mean over samples of Σ (w·∂L/∂w)² over all weights that a unit owns.

    Optimal brain damage (LeCun et al., 1989) with the diagonal of the empirical Fisher
    information for the Hessian, up to its factor ½.
    """
    return _mean(group, context, "fisher")


@importance("head_gradient", needs=("head_gradient",))
def head_gradient(group: Group, context: Context) -> Scores:
    """Mean over samples of |∂L/∂ξ| with ξ = 1 a factor on the unit wherever it is read.

    Michel et al., 2019 (eq. 2), for the units of any group.  What reads is linear in the unit, so
    that this is |Σ w·∂L/∂w| over the weights that read it.
    """
    return _mean(group, context, "head_gradient")


def _mean(group: Group, context: Context, name: str) -> Scores:
    return context.statistics.units[name][group.units] / context.statistics.samples


@importance("activation", needs=("activation",))
def activation(group: Group, context: Context) -> Scores:
    """Root of the sum over all that reads a unit of the mean square of what is read."""
    return np.sqrt(_over_sites(group, context, lambda site: site.mean_square))


@importance("wanda", needs=("activation",))
def wanda(group: Group, context: Context) -> Scores:
    """Σ ‖W_:,j‖·‖h_j‖ over the columns j that read a unit.

    Sun et al., 2024, with whole columns for single weights; ‖h_j‖ is the root of the mean square,
    so that neither the number of samples nor the number of positions counts.
    """
    return _over_sites(group, context, lambda site: np.sqrt(site.weight * site.mean_square))


@importance("flap", needs=("activation",))
def flap(group: Group, context: Context) -> Scores:
    """Σ Var(h_j)·‖W_:,j‖² over the columns j that read a unit, standardised in the group.

    An et al., 2024: what is constant a bias can replace.  Scores of a group have mean 0 and
    standard deviation 1 (0 where all are equal), which makes groups comparable.
    """
    raw = _over_sites(group, context, lambda site: site.variance * site.weight)
    if not np.isfinite(raw).all():
        return raw
    spread = raw.std()
    return (raw - raw.mean()) / spread if spread > 0 else np.zeros(group.size)


def _over_sites(group: Group, context: Context, values: Callable[[Site], Scores]) -> Scores:
    """The sum of a value per position over all that reads a unit; infinite if nothing does."""
    total = np.zeros(group.size)
    read = False
    for site in context.statistics.sites:
        if np.isin(site.label, group.units).any():
            read = True
            total += sum_by_unit(group, site.label, values(site))
    return total if read else np.full(group.size, np.inf)
