"""Criteria that read data: gradients and activations of calibration, movement in fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from prunus.calibration.gradients import Contributions
from prunus.calibration.sites import Site
from prunus.errors import DataError, ModelError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.program import state_of
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


@checks_options
class Movement:
    """Collects movement scores during the user's own fine-tuning, and is an importance then.

    The score of a unit is ``−Σ w·∂L/∂w`` over all weights that it owns and all steps (Sanh et
    al., 2020, eq. 4; whole blocks as in Lagunas et al., 2021): positive where gradient descent
    moves the unit away from zero.

    Attributes
    ----------
    steps, skipped
        Steps that count; those that don't, since their gradients were not finite (a gradient
        scaler skips them as well).
    scores
        By unit id, shape ``(unit_count + 1,)``.

    Examples
    --------
    >>> movement = prunus.importance.Movement(graph, model)             # doctest: +SKIP
    >>> for batch in loader:                                 # doctest: +SKIP
    ...     loss(model, batch).backward()
    ...     movement.step()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> plan = prunus.plan(graph, model, ratio=0.3, importance=movement)  # doctest: +SKIP
    """

    __name__ = "movement"

    def __init__(self, graph: CouplingGraph, model: nn.Module) -> None:
        self._model = model
        self._contributions = Contributions(graph)
        self.steps = 0
        self.skipped = 0
        self.scores: Scores = np.zeros(graph.unit_count + 1)

    def step(self) -> None:
        """Add what the present gradients say: after ``backward``, before ``optimizer.step``.

        Where gradients accumulate over several batches, once for all of them; scaled ones are
        unscaled before.

        Raises
        ------
        ModelError
            If there are no gradients.
        """
        tensors, _ = state_of(self._model)
        weights = {name: tensors[name] for name in self._contributions.names}
        gradients = {name: weight.grad for name, weight in weights.items()}
        if all(gradient is None for gradient in gradients.values()):
            raise ModelError(
                "no weight has a gradient",
                why="gradients come with backward() and go with zero_grad()",
                fix="call movement.step() between the two",
            )
        plain, _ = self._contributions.reduce(weights, gradients)
        if not np.isfinite(plain).all():
            self.skipped += 1
            return
        self.scores -= self._contributions.owned(plain)
        self.steps += 1

    def __call__(self, group: Group, context: Context) -> Scores:
        """The scores of a group's units; they may be negative."""
        if context.graph.unit_count + 1 != len(self.scores):
            raise ModelError(
                "the movement scores are those of another model",
                why=f"they speak of {len(self.scores) - 1} units, and the graph has "
                f"{context.graph.unit_count}",
                fix="collect them with this graph",
            )
        if not self.steps:
            raise DataError(
                "there are no movement scores",
                why=f"all {self.skipped} steps had gradients that are not finite"
                if self.skipped
                else "movement.step() was never called",
                fix="fine-tune first, and call movement.step() after every backward()",
            )
        return self.scores[group.units]
