"""What a person sees: counts, tables, pictures, JSON; every print of Prunus lives here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.report.console import show_stages
    from prunus.report.counting import measure_activation, measure_costs, measure_latency
    from prunus.report.pictures import draw_channels, draw_sensitivity

__all__ = [
    "draw_channels",
    "draw_sensitivity",
    "measure_activation",
    "measure_costs",
    "measure_latency",
    "show_stages",
]

_HOMES = {
    "draw_channels": "pictures",
    "draw_sensitivity": "pictures",
    "measure_activation": "counting",
    "measure_costs": "counting",
    "measure_latency": "counting",
    "show_stages": "console",
}


def __getattr__(name: str) -> Any:  # printing an error must not import torch
    if name not in _HOMES:
        raise AttributeError(f"module 'prunus.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunus.report.{_HOMES[name]}"), name)
