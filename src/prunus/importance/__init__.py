"""Scores of units: one function per criterion, registered by name."""

from prunus.calibration.statistics import Statistics, collect
from prunus.importance import calibrated as _calibrated
from prunus.importance import magnitude as _magnitude
from prunus.importance import obs as _obs
from prunus.importance import routed as _routed
from prunus.importance.calibrated import Movement
from prunus.importance.influence import block_influence
from prunus.importance.registry import (
    Context,
    Importance,
    importance,
    name_of,
    names,
    needs_of,
    score,
)

__all__ = [
    "Context",
    "Importance",
    "Movement",
    "Statistics",
    "block_influence",
    "collect",
    "importance",
    "name_of",
    "names",
    "needs_of",
    "score",
]

del _calibrated, _magnitude, _obs, _routed
