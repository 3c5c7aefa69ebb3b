"""Costs counted from outside, by PyTorch itself: a second opinion on the cost polynomials."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunus.tracer.trace import plain_kernels, quiet_run


def measure_costs(
    model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Count a model's params, MACs and bytes without any label or polynomial.

    The forward really runs, once, in eval mode, under PyTorch's own FLOP counter (halved, with
    attention as plain matrix products).  Tied tensors count once; bytes are those of parameters
    and buffers.

    Parameters
    ----------
    model
        It is not modified.
    args, kwargs
        What the forward is called with; MACs are for these inputs, batch included.

    Examples
    --------
    >>> measure_costs(nn.Linear(8, 3), torch.zeros(2, 8))
    {'params': 27, 'macs': 48, 'bytes': 108}
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    counter = FlopCounterMode(display=False)
    with quiet_run(model), plain_kernels(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*args, **(kwargs or {}))
    state = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "bytes": sum(t.numel() * t.element_size() for t in state.values()),
    }


def measure_latency(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warmup: int = 3,
    repeats: int = 15,
) -> float:
    """Milliseconds of a forward in eval mode: the median of ``repeats``, after a warm-up.

    Parameters
    ----------
    warmup, repeats
        Forwards that are not timed, and those that are.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    times = []
    with _evaluating(model), torch.inference_mode():
        for index in range(warmup + repeats):
            _finish(args)
            start = time.perf_counter()
            model(*args, **(kwargs or {}))
            _finish(args)
            if index >= warmup:
                times.append(time.perf_counter() - start)
    return 1e3 * median(times)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _finish(args: tuple[Any, ...]) -> None:
    """Wait until the device has done what it was asked to."""
    if any(isinstance(value, Tensor) and value.is_cuda for value in args):
        torch.cuda.synchronize()
