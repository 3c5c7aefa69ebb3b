"""Repair what a cut leaves behind: what consumers read, and the statistics of norms."""

from prunus.recovery.compensate import Compensation, compensate
from prunus.recovery.norms import recalibrate

__all__ = ["Compensation", "compensate", "recalibrate"]
