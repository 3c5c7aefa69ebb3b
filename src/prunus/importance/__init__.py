"""Scores of units: one function per criterion, registered by name."""

from prunus.importance import control as _control
from prunus.importance import magnitude as _magnitude
from prunus.importance.registry import Context, Importance, importance, names, score

__all__ = ["Context", "Importance", "importance", "names", "score"]

del _control, _magnitude
