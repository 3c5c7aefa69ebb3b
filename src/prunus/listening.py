"""Make a network listen, so that a comparison proves something.

A network at initialisation ignores much of what could be wrong with it: residual branches that
end in zeros, batch norms without statistics, attention that looks everywhere alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.tracer.trace import quiet_run

SMALL = 0.1
"""A constant parameter below this is a switched-off branch, not a scale."""


def listen(model: nn.Module, args: Any, kwargs: Mapping[str, Any], *, seed: int = 0) -> None:
    """Fill what initialisation left constant and randomise batch statistics, in place.

    Constant weights become random, constant scales are drawn from [0.5, 1.5], constant biases
    from N(0, 0.1²).  Batch norms get the statistics of the example inputs, perturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(_fill(name, parameter, generator))
        _settle_batch_norms(model, args, kwargs)
        for module in model.modules():
            if _has_statistics(module):
                _perturb(module, generator)


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    value = float(parameter.flatten()[0])
    noise = torch.randn(parameter.shape, generator=generator)
    scale = 0.5 + torch.rand(parameter.shape, generator=generator)
    if abs(value) >= SMALL:
        filled = value * scale
    elif "bias" in name.rpartition(".")[2]:
        filled = SMALL * noise
    elif sum(size > 1 for size in parameter.shape) > 1:
        filled = noise / max(parameter[0].numel(), 1) ** 0.5
    else:
        filled = scale
    return filled.to(parameter)


def _has_statistics(module: nn.Module) -> bool:
    mean = getattr(module, "running_mean", None)
    return isinstance(mean, Tensor) and isinstance(getattr(module, "running_var", None), Tensor)


def _settle_batch_norms(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Statistics of the example inputs, layer by layer in the order in which they run."""

    def settle(module: Any, inputs: tuple[Any, ...]) -> None:
        values = inputs[0] if inputs else None
        if isinstance(values, Tensor) and values.dim() > 1 and values.is_floating_point():
            rest = [0, *range(2, values.dim())]
            mean, variance = values.mean(rest), values.var(rest, correction=0)
            if mean.shape == module.running_mean.shape:
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance + 0.1 * variance.mean() + 1e-6)

    handles = [m.register_forward_pre_hook(settle) for m in model.modules() if _has_statistics(m)]
    try:
        if handles:
            with quiet_run(model):
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _perturb(module: Any, generator: torch.Generator) -> None:
    shape = module.running_mean.shape
    spread = module.running_var.sqrt()
    module.running_mean += 0.2 * spread * torch.randn(shape, generator=generator).to(spread)
    module.running_var *= (0.7 + 0.7 * torch.rand(shape, generator=generator)).to(spread)
