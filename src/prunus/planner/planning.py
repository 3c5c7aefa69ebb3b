"""What is kept: from scores, a budget and blocks to drop to a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from prunus.calibration.batches import Batches
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.progress import shows
from prunus.planner.depth_planning import (
    measure_influence,
    plan_depth,
    refuse_statistics,
    traced_inputs,
)
from prunus.planner.layers import drops_asked
from prunus.planner.options import PlanKeywords, PlanOptions, takes_options
from prunus.planner.width_planning import plan_widths
from prunus.surgeon.tensors import refuse_quantized
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.wrappers import unwraps

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(PlanOptions)
@shows("planning")
@unwraps
def plan(
    graph: CouplingGraph,
    model: nn.Module,
    **options: Unpack[PlanKeywords],
) -> Plan:
    """Choose the units that are kept, so that every cost is under its budget, or by a ratio.

    Where blocks are dropped, they are removed first, and the rest meets what is left of the budget.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` returned, and the model whose weights are scored.
    **options

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.  If a scope of the
        budget matches nothing.  If no plan is as fast as asked; it says how fast one
        can get.
    DataError
        If the importance needs calibration data and there is none.
    PlanError
        If an option can't have this value, or contradicts another.  If blocks can't be dropped, the
        message says why; or if statistics are given along: they are those of the model with all its
        blocks.  If a glob matches no group, or a ratio contradicts a floor, the rounding or another
        ratio.
    """
    asked = PlanOptions(**options)
    asked.check()
    if not asked.drops:
        return plan_widths(graph, model, asked)
    refuse_quantized(model)
    refuse_statistics(asked.statistics)
    data = None if asked.data is None else Batches(asked.data, asked.samples)
    asked = replace(asked, data=data)
    args, kwargs = traced_inputs(graph, model, asked.seed)
    with entered_by(model, graph.forward_fn):
        names = drops_asked(
            graph, asked, lambda: measure_influence(model, graph, data, args, kwargs)
        )
        return plan_depth(graph, model, names, args, kwargs, asked)[0]
