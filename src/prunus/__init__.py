"""Prunus: structured pruning that rewrites a PyTorch model into a smaller dense one.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.anatomy import structures
    from prunus.api import Shrunk, drop_layers, shrink
    from prunus.budget import Budget
    from prunus.choices import keep, prune_heads
    from prunus.errors import BudgetError, PrunusError
    from prunus.graph.axis import Axis
    from prunus.graph.blocks import Block
    from prunus.graph.coupling import CouplingGraph
    from prunus.importance import Movement, Statistics, collect
    from prunus.importance.influence import block_influence
    from prunus.integrations.torchvision_ops import declare_missing_ops
    from prunus.io import load, save
    from prunus.latency import LatencyTable, measure
    from prunus.listening import listen
    from prunus.oracle import Certificate, verify
    from prunus.planning import plan
    from prunus.plans import Plan
    from prunus.ratio_search import Found, plan_by_sensitivity, search_ratios
    from prunus.recovery import Compensation, compensate, recalibrate
    from prunus.report.console import show_stages
    from prunus.report.counting import measure_activation, measure_costs, measure_latency
    from prunus.report.heat_map import draw_sensitivity
    from prunus.report.pictures import draw_channels
    from prunus.sensing import sensitivity
    from prunus.sensitivity_table import Sensitivity
    from prunus.surgeon import apply, mask
    from prunus.tracer.trace import trace
    from prunus.witness import testify

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Block",
    "Budget",
    "BudgetError",
    "Certificate",
    "Compensation",
    "CouplingGraph",
    "Found",
    "LatencyTable",
    "Movement",
    "Plan",
    "PrunusError",
    "Sensitivity",
    "Shrunk",
    "Statistics",
    "apply",
    "block_influence",
    "collect",
    "compensate",
    "declare_missing_ops",
    "draw_channels",
    "draw_sensitivity",
    "drop_layers",
    "keep",
    "listen",
    "load",
    "mask",
    "measure",
    "measure_activation",
    "measure_costs",
    "measure_latency",
    "plan",
    "plan_by_sensitivity",
    "prune_heads",
    "recalibrate",
    "save",
    "search_ratios",
    "sensitivity",
    "show_stages",
    "shrink",
    "structures",
    "testify",
    "trace",
    "verify",
]

_HOMES = {
    "Axis": "prunus.graph.axis",
    "Block": "prunus.graph.blocks",
    "Budget": "prunus.budget",
    "BudgetError": "prunus.errors",
    "Certificate": "prunus.oracle",
    "Compensation": "prunus.recovery",
    "CouplingGraph": "prunus.graph.coupling",
    "LatencyTable": "prunus.latency",
    "Found": "prunus.ratio_search",
    "Movement": "prunus.importance",
    "Plan": "prunus.plans",
    "PrunusError": "prunus.errors",
    "Sensitivity": "prunus.sensitivity_table",
    "Shrunk": "prunus.api",
    "Statistics": "prunus.importance",
    "apply": "prunus.surgeon",
    "block_influence": "prunus.importance.influence",
    "collect": "prunus.importance",
    "compensate": "prunus.recovery",
    "declare_missing_ops": "prunus.integrations.torchvision_ops",
    "draw_channels": "prunus.report.pictures",
    "draw_sensitivity": "prunus.report.heat_map",
    "drop_layers": "prunus.api",
    "keep": "prunus.choices",
    "listen": "prunus.listening",
    "load": "prunus.io",
    "mask": "prunus.surgeon",
    "measure": "prunus.latency",
    "measure_activation": "prunus.report.counting",
    "measure_costs": "prunus.report.counting",
    "measure_latency": "prunus.report.counting",
    "plan": "prunus.planning",
    "plan_by_sensitivity": "prunus.ratio_search",
    "prune_heads": "prunus.choices",
    "recalibrate": "prunus.recovery",
    "save": "prunus.io",
    "search_ratios": "prunus.ratio_search",
    "sensitivity": "prunus.sensing",
    "show_stages": "prunus.report.console",
    "shrink": "prunus.api",
    "structures": "prunus.anatomy",
    "testify": "prunus.witness",
    "trace": "prunus.tracer.trace",
    "verify": "prunus.oracle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
