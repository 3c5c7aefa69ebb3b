"""Latency: what the operators of a model cost on this machine, at any width."""

from prunus.latency.measuring import measure
from prunus.latency.table import LatencyTable, Prediction

__all__ = ["LatencyTable", "Prediction", "measure"]
