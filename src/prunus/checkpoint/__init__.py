"""Whole models in one file: save, load, and the container that they are kept in."""

from prunus.checkpoint.load import load
from prunus.checkpoint.save import save

__all__ = ["load", "save"]
