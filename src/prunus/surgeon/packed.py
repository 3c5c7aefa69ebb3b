"""Weights that are no plain tensors can't be sliced."""

from __future__ import annotations

import torch
from torch import nn

from prunus.errors import ModelError

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def refuse_packed(model: nn.Module) -> None:
    """Refuse a quantized model, whose weights are packed, or integers with scales elsewhere.

    Raises
    ------
    ModelError
        With the first such module.
    """
    for name, module in model.named_modules():
        kind = type(module)
        packed = ".quantized." in f"{kind.__module__}." or hasattr(module, "_packed_params")
        if packed or any(_is_packed(weight) for weight in module.parameters(recurse=False)):
            raise ModelError(
                f"{kind.__name__} holds quantized weights",
                where=name,
                why="packed weights have no rows and columns that could be removed",
                fix="prune the model first, and quantize the result",
            )


def _is_packed(weight: nn.Parameter) -> bool:
    own = weight.detach()
    foreign = type(own) not in _PLAIN and not isinstance(own, torch._subclasses.FakeTensor)
    return weight.is_quantized or foreign or not (own.is_floating_point() or own.is_complex())
