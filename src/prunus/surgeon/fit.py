"""A plan for a model that lacks what a forward leaves on modules: features, potentials, caches.

The forward assigns these tensors, so a model that has not run yet has none of them, or others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from prunus.graph.axis import Axis
from prunus.graph.plans import Plan


def fit_plan(plan: Plan, state: Mapping[str, Tensor]) -> Plan:
    """The plan without the axes of what a forward assigns, where the model has none of that size.

    Parameters
    ----------
    state
        The model's tensors by their first names, blocks that the plan drops apart.
    """
    written = plan.written
    if not written:
        return plan

    def fits(axis: Axis) -> bool:
        tensor, shape = state.get(axis.tensor), plan.shapes[axis.tensor]
        if axis.tensor not in written or isinstance(tensor, nn.Parameter):
            return True
        alike = tensor is not None and tensor.dim() == len(shape)
        return alike and tensor.shape[axis.dim] == shape[axis.dim]  # type: ignore[union-attr]

    keep = {axis: stay for axis, stay in plan.keep.items() if fits(axis)}
    sliced = {axis.tensor for axis in keep}
    shapes = {
        name: tuple(state[name].shape) if name in state and name in written else shape
        for name, shape in plan.shapes.items()
        if name not in written or name in sliced
    }
    return replace(plan, keep=keep, shapes=shapes)
