"""Whole models in one file: save, load, and the container that they are kept in."""

from prunus.checkpoint.model_file import load, save

__all__ = ["load", "save"]
