"""Call a model on what a loader gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import DataError


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch of a loader, moved to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, dict):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise DataError("a calibration batch is empty", fix="give at least the input")
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise DataError(
            f"a calibration batch is a {type(batch).__name__}",
            why="a batch is a tensor, a tuple whose first entry is one, or a mapping of keywords",
            fix="give forward_fn=lambda model, batch: model(...)",
        )
    return model(batch.to(device))
