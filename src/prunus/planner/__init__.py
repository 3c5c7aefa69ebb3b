"""Which units to remove under a budget: pure, deterministic, and without a model."""

from prunus.planner.allocate import Selection, select
from prunus.planner.thin import thin

__all__ = ["Selection", "select", "thin"]
