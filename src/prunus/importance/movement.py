"""Movement scores: whether fine-tuning moves a unit's weights away from zero or towards it."""

from __future__ import annotations

import numpy as np
from torch import nn

from prunus.calibration.gradients import Contributions
from prunus.errors import DataError, ModelError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.program import state_of
from prunus.importance.registry import Context, Scores


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
