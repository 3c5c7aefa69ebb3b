"""Which units to remove under a budget: pure, deterministic, and without a model."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "search":  # which imports the planner, and loads on first use
        raise AttributeError(f"module 'prunus.planner' has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.search")
