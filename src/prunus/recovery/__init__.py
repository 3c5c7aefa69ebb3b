"""Repair what a cut leaves behind: what consumers read, and the statistics of norms."""

from prunus.recovery.compensate import Compensation, compensate
from prunus.recovery.norms import recalibrate
from prunus.recovery.recover import (
    LOOKED_AT,
    Recover,
    Step,
    answers_of,
    check_recovery,
    cut_and_recover,
    distance,
)

__all__ = [
    "LOOKED_AT",
    "Compensation",
    "Recover",
    "Step",
    "answers_of",
    "check_recovery",
    "compensate",
    "cut_and_recover",
    "distance",
    "recalibrate",
]
