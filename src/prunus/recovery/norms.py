"""Batch norms measure their statistics again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from prunus.calibration.batches import SAMPLES, Batches, run_all
from prunus.errors import DataError, checks_options
from prunus.graph.progress import Progress, following
from prunus.surgeon.snapshot import all_or_nothing
from prunus.tracer.quiet import same_modes

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
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return model
    with same_modes(model.modules()), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            with following(progress):
                run_all(*(model, Batches(data, samples), forward_fn), stage="measuring batch norms")
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    for norm in norms:
        check_finite(norm)
    return model


def check_finite(norm: nn.Module) -> None:
    """Refuse statistics that are not finite."""
    values = [buffer for buffer in norm.buffers() if buffer.is_floating_point()]
    if not all(bool(torch.isfinite(one).all()) for one in values):
        raise DataError(
            "the calibration data led to statistics that are not finite",
            why="it holds NaN or infinite values, or the model makes them",
            fix="clean the data; the model was put back",
        )


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]
