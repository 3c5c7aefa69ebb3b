"""Prunus: structured pruning that rewrites a PyTorch model into a smaller dense one.

The public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.api import Shrunk, drop_layers, shrink
    from prunus.checkpoint import load, save
    from prunus.choices import keep, prune_heads
    from prunus.errors import BudgetError, PrunusError
    from prunus.graph.axis import Axis
    from prunus.graph.blocks import Block
    from prunus.graph.budget import Budget
    from prunus.graph.coupling import CouplingGraph
    from prunus.graph.plans import Plan
    from prunus.importance import Movement, Statistics, collect
    from prunus.importance.influence import block_influence
    from prunus.latency import LatencyTable, measure
    from prunus.planner.planning import plan
    from prunus.planner.search.ratio_search import Found, plan_by_sensitivity, search_ratios
    from prunus.planner.search.sensitivity import sensitivity
    from prunus.planner.search.sensitivity_table import Sensitivity
    from prunus.recovery import Compensation, compensate, recalibrate
    from prunus.report.console import show_stages
    from prunus.report.counting import measure_activation, measure_costs, measure_latency
    from prunus.report.heat_map import draw_sensitivity
    from prunus.report.pictures import draw_channels
    from prunus.surgeon import apply, mask
    from prunus.tracer.trace import trace
    from prunus.verifier.randomize import listen
    from prunus.verifier.verify import Certificate, verify

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
    "trace",
    "verify",
]

_HOMES = {
    "Axis": "prunus.graph.axis",
    "Block": "prunus.graph.blocks",
    "Budget": "prunus.graph.budget",
    "BudgetError": "prunus.errors",
    "Certificate": "prunus.verifier.verify",
    "Compensation": "prunus.recovery",
    "CouplingGraph": "prunus.graph.coupling",
    "LatencyTable": "prunus.latency",
    "Found": "prunus.planner.search.ratio_search",
    "Movement": "prunus.importance",
    "Plan": "prunus.graph.plans",
    "PrunusError": "prunus.errors",
    "Sensitivity": "prunus.planner.search.sensitivity_table",
    "Shrunk": "prunus.api",
    "Statistics": "prunus.importance",
    "apply": "prunus.surgeon",
    "block_influence": "prunus.importance.influence",
    "collect": "prunus.importance",
    "compensate": "prunus.recovery",
    "draw_channels": "prunus.report.pictures",
    "draw_sensitivity": "prunus.report.heat_map",
    "drop_layers": "prunus.api",
    "keep": "prunus.choices",
    "listen": "prunus.verifier.randomize",
    "load": "prunus.checkpoint",
    "mask": "prunus.surgeon",
    "measure": "prunus.latency",
    "measure_activation": "prunus.report.counting",
    "measure_costs": "prunus.report.counting",
    "measure_latency": "prunus.report.counting",
    "plan": "prunus.planner.planning",
    "plan_by_sensitivity": "prunus.planner.search.ratio_search",
    "prune_heads": "prunus.choices",
    "recalibrate": "prunus.recovery",
    "save": "prunus.checkpoint",
    "search_ratios": "prunus.planner.search.ratio_search",
    "sensitivity": "prunus.planner.search.sensitivity",
    "show_stages": "prunus.report.console",
    "shrink": "prunus.api",
    "trace": "prunus.tracer.trace",
    "verify": "prunus.verifier.verify",
}

_PACKAGES = {
    "calibration", "checkpoint", "graph", "importance", "integrations", "planner", "recovery",
    "report", "structures", "verifier",
}  # fmt: skip
"""What is rarely needed is taken from its package, ``prunus.structures.find_structures`` say."""


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"prunus.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
