"""Repair what a cut leaves behind: the statistics of norms."""

from prunus.recovery.norms import recalibrate

__all__ = ["recalibrate"]
