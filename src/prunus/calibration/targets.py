"""The loss whose gradients are taken: of the labels, or without any of the model's own answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunus.calibration.batches import labels_of
from prunus.errors import DataError
from prunus.graph.program import tensors_of

Loss = Callable[[Any, Any], Tensor]
"""``(output, batch) → scalar``; the batch holds one sample."""

_FIX = "give loss=lambda output, batch: …, which returns a scalar"


def loss_of(
    output: Any, batch: Any, *, loss: Loss | None, kept: Collection[str], seed: int
) -> Tensor:
    """A scalar that depends on the weights, the first of these that there is:

    - what ``loss`` returns;
    - with labels, the model's own ``.loss``, or the cross-entropy of its class scores;
    - of class scores (an output ``logits``, or a single one of two or three dims) the
      cross-entropy towards the model's own largest, averaged over positions (those that an
      ``attention_mask`` hides left out);
    - of other outputs ``Σ ε·y / √n`` with ε drawn from a normal by ``seed``: the expected square
      of its derivative along a direction is how much the outputs move along it (the Fisher
      information of a normal model, Martens, 2020).

    Raises
    ------
    DataError
        If there is no such scalar.
    """
    if loss is not None:
        return _checked(loss(output, batch))
    labels = labels_of(batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if labels is not None and isinstance(own, Tensor):
        return _checked(own)
    outputs = _outputs_in(output, kept)
    scores = outputs.get("logits")
    if scores is None and len(outputs) == 1:
        (scores,) = (one if one.dim() in (2, 3) else None for one in outputs.values())
    if labels is not None:
        first = next(iter(outputs.values()))
        return _checked(_towards(first if scores is None else scores, labels))
    if scores is not None:
        return _checked(_towards_largest(scores, batch))
    return _checked(_towards_noise([*outputs.values()], seed))


def _outputs_in(output: Any, kept: Collection[str]) -> dict[str, Tensor]:
    """Outputs of fractions by name: those that are kept, if there are any."""
    found = {n: t for n, t in tensors_of(output) if t.is_floating_point() and n != "loss"}
    if not found:
        raise DataError(
            "the model's output has no floating-point tensor",
            why="the criteria that read gradients need something to differentiate",
            fix=_FIX,
        )
    return {name: t for name, t in found.items() if name in kept} or found


def _checked(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        if bool(torch.isfinite(value)):
            return value.sum()
        raise DataError(
            f"the loss of a sample is {value.item()}",
            why="the sample holds NaN or infinite values, or the model makes them",
            fix="clean the data",
        )
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    scalar = isinstance(value, Tensor) and value.numel() == 1
    raise DataError(
        "the loss does not depend on the weights" if scalar else f"the loss is no scalar: {shape}",
        why="it was computed without gradients, or from other tensors" if scalar else "",
        fix=_FIX,
    )


def _towards(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes in the last dim, or in dim 1 as convolutions leave them."""
    labels = labels.to(scores.device)
    if not labels.is_floating_point():
        if labels.shape == scores.shape[:-1]:
            return F.cross_entropy(scores.flatten(0, -2), labels.flatten().long())
        if labels.shape == (*scores.shape[:1], *scores.shape[2:]):
            return F.cross_entropy(scores, labels.long())
    raise DataError(
        f"these labels are no classes: {labels.dtype} of shape {tuple(labels.shape)}",
        why=f"the output has shape {tuple(scores.shape)}",
        fix=f"{_FIX}, or give the inputs alone",
    )


def _towards_largest(scores: Tensor, batch: Any) -> Tensor:
    rows = scores.flatten(0, -2)
    target = rows.detach().argmax(-1)
    seen = batch.get("attention_mask") if isinstance(batch, dict) else None
    if isinstance(seen, Tensor) and seen.shape == scores.shape[:-1] and bool(seen.any()):
        hidden = (seen == 0).flatten().to(target.device)
        target = target.masked_fill(hidden, -100)
    return F.cross_entropy(rows, target)


def _towards_noise(outputs: list[Tensor], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for values in outputs:
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        parts.append((values * noise.to(values)).sum() / max(values.numel(), 1) ** 0.5)
    return torch.stack(parts).sum()
