"""Where a model comes from: how it is built, and what it takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes
    ----------
    build
        Makes the model, its weights loaded.
    bare
        Makes it with any weights.
    examples
        From the built model, what its forward is called with.
    mean, std
        What images are normalised with.
    folder
        Where a tokenizer may lie.
    """

    build: Callable[[], nn.Module]
    bare: Callable[[], nn.Module]
    examples: Callable[[nn.Module], tuple[tuple[Any, ...], Mapping[str, Any]]]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    folder: Path | None = None


def random_image(
    options: argparse.Namespace, size: tuple[int, ...]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """One image of random numbers; nothing where the shapes are given by hand."""
    if options.input_shape:
        return (), {}
    random = torch.Generator().manual_seed(options.seed)
    return (torch.randn(1, *size, generator=random),), {}
