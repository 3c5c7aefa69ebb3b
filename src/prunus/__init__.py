"""Prunus: structured pruning that rewrites a PyTorch model into a smaller dense one.

The public names and packages load on first use, so that importing Prunus costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus import errors as errors
    from prunus import importance as importance
    from prunus import planner as planner
    from prunus import recovery as recovery
    from prunus import report as report
    from prunus import structures as structures
    from prunus import training as training
    from prunus import verifier as verifier
    from prunus.api import drop_layers, prune_heads, shrink
    from prunus.checkpoint import load, save
    from prunus.errors import PrunusError
    from prunus.graph.budget import Budget
    from prunus.graph.coupling import CouplingGraph
    from prunus.graph.plans import Plan
    from prunus.planner.planning import plan
    from prunus.surgeon import apply, mask
    from prunus.tracer.trace import trace
    from prunus.training import Schedule
    from prunus.verifier.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CouplingGraph",
    "Plan",
    "PrunusError",
    "Schedule",
    "apply",
    "drop_layers",
    "load",
    "mask",
    "plan",
    "prune_heads",
    "save",
    "shrink",
    "trace",
    "verify",
]

_HOMES = {
    "Budget": "prunus.graph.budget",
    "CouplingGraph": "prunus.graph.coupling",
    "Plan": "prunus.graph.plans",
    "PrunusError": "prunus.errors",
    "Schedule": "prunus.training",
    "apply": "prunus.surgeon",
    "drop_layers": "prunus.api",
    "load": "prunus.checkpoint",
    "mask": "prunus.surgeon",
    "plan": "prunus.planner.planning",
    "prune_heads": "prunus.api",
    "save": "prunus.checkpoint",
    "shrink": "prunus.api",
    "trace": "prunus.tracer.trace",
    "verify": "prunus.verifier.verify",
}

_PACKAGES = {
    "api", "calibration", "checkpoint", "errors", "graph", "importance", "integrations",
    "planner", "recovery", "report", "structures", "training", "verifier",
}  # fmt: skip
"""What is rarely needed is taken from its package, ``prunus.importance.collect`` say."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"prunus.{name}")
    raise AttributeError(f"module 'prunus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
