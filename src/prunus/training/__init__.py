"""Pruning during training: rounds on a schedule, composed into one plan for the original model."""

from prunus.training.rounds import Round
from prunus.training.schedule import Schedule

__all__ = ["Round", "Schedule"]
