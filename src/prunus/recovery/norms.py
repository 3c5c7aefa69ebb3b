"""Batch norms measure their statistics again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from prunus.calibration.batches import SAMPLES, Batches, no_data, run_batch
from prunus.errors import DataError, checks_options
from prunus.graph.progress import Progress, counted, following
from prunus.surgeon.snapshot import all_or_nothing

Model = TypeVar("Model", bound=nn.Module)


@checks_options
@all_or_nothing
def recalibrate(
    model: Model,
    data: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Model:
    """Replace the running statistics of every batch norm by those of the data, in place.

    Statistics are the cumulative average over all batches (``momentum=None``), so each batch
    counts alike; everything that is no batch norm stays in eval mode.  Labels are not needed.

    Parameters
    ----------
    data
        Batches: a tensor, or a tuple or list whose first entry is the input, or a mapping of
        keyword arguments.
    forward_fn
        Called as ``forward_fn(model, batch)`` in place of the above.
    samples
        How many samples are read: the first ones, in whole batches.
    progress
        As of :func:`prunus.importance.collect`.

    Raises
    ------
    DataError
        If the data holds no batch; the model is as it was.
    """
    norms = batch_norms(model)
    if norms:
        with following(progress):
            measure(model, norms, Batches(data, samples), forward_fn=forward_fn)
    return model


def measure(
    model: nn.Module,
    norms: Sequence[nn.modules.batchnorm._BatchNorm],
    data: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Do what :func:`recalibrate` does for some of a model's batch norms."""
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    ran = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in counted(data, "measuring batch norms"):
                ran = True
                (forward_fn or run_batch)(model, batch)
        if not ran:
            raise no_data()
        if not all(_is_finite(norm) for norm in norms):
            raise DataError(
                "the calibration data led to statistics that are not finite",
                why="it holds NaN or infinite values, or the model makes them",
                fix="clean the data; the model was put back",
            )
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _is_finite(norm: nn.Module) -> bool:
    return all(bool(torch.isfinite(b).all()) for b in norm.buffers() if b.is_floating_point())
