"""Pruning during training: rounds on a schedule, composed into one plan for the original model."""

from prunus.training.schedule import Round, Schedule

__all__ = ["Round", "Schedule"]
