"""Give layers without a bias one that is zero, so that it can take up a constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from prunus.errors import ApplyError
from prunus.surgeon.snapshot import Snapshot


def add_biases(model: nn.Module, biases: Mapping[str, int]) -> None:
    """Make the biases that are not there yet, in place.

    Parameters
    ----------
    biases
        Name of each bias, and the dim of its module's weight along which it goes.

    Raises
    ------
    ApplyError
        If a module has no such weight, or no place for a bias; nothing was changed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    made: list[tuple[nn.Module, nn.Parameter]] = []
    for name, dim in biases.items():
        prefix, _, own = name.rpartition(".")
        module = modules.get(prefix)
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or own not in module._parameters:
            raise ApplyError(
                f"there is no place for {name}",
                where=prefix,
                why="a bias is given to a layer that has a weight and may have a bias",
                fix="apply the plan to the model that it was made for",
            )
        if module._parameters[own] is None:
            zeros = torch.zeros(weight.shape[dim], dtype=weight.dtype, device=weight.device)
            made.append((module, nn.Parameter(zeros, requires_grad=weight.requires_grad)))
    for module, bias in made:
        module.bias = bias


@contextmanager
def with_biases(model: nn.Module, biases: Mapping[str, int]) -> Iterator[None]:
    """Within the context the model has the biases."""
    before = Snapshot(model)
    try:
        add_biases(model, biases)
        yield
    finally:
        before.restore()
