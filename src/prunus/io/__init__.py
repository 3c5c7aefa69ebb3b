"""Whole models in one file: save, load, and the container that they are kept in."""

from prunus.io.load import load
from prunus.io.save import save

__all__ = ["load", "save"]
