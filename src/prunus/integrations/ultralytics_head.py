"""The head of a model of ultralytics, for another number of classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_CLASS_LAYERS = ("cv3", "one2one_cv3", "enc_score_head", "dec_score_head", "denoising_class_embed")
"""In heads of ultralytics, what has one output (or embedding) for each class, at its end."""


def fit_classes(model: Any, count: int, names: Mapping[int, str]) -> None:
    """Give the head another number of classes; classification heads are fitted by ultralytics.

    Classes of a name that the model has keep its weights.  Others begin with weights as spread as
    these are, and with their mean bias.
    """
    head = model.model[-1]
    known = {name: row for row, name in model.names.items() if name != str(row)}
    rows = [known.get(names.get(new, "")) for new in range(count)]
    same = rows == list(range(count)) or not any(row is not None for row in rows)
    if not hasattr(head, "nc") or (head.nc == count and same):
        return
    for holder, name in _class_layers(head):
        setattr(holder, name, _with_rows(getattr(holder, name), rows))
    head.nc = model.yaml["nc"] = count
    if hasattr(head, "no"):
        head.no = count + 4 * head.reg_max


def _class_layers(head: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names in them of layers with one output, or embedding, for each class."""
    for branch in _CLASS_LAYERS:
        part = getattr(head, branch, None)
        places = part._modules if isinstance(part, nn.ModuleList) else [branch] if part else []
        for place in places:
            holder, name = (part if isinstance(part, nn.ModuleList) else head), place
            layer = getattr(holder, name)
            if isinstance(layer, nn.Sequential):
                holder, name = layer, str(len(layer) - 1)
            yield holder, name
    semantic = getattr(getattr(head, "proto", None), "semseg", None)
    if semantic is not None:
        yield semantic, str(len(semantic) - 1)


def _with_rows(layer: Any, rows: Sequence[int | None]) -> Any:
    """A layer whose outputs are these of the old one, and new ones where there is None."""
    new = copy.deepcopy(layer)
    for name, old in layer.named_parameters():
        old = old.detach()
        spread = old.std() if old.dim() > 1 else 0.0  # biases are alike
        data = torch.randn(len(rows), *old.shape[1:]).to(old) * spread
        data += 0 if old.dim() > 1 else old.mean()
        for place, row in enumerate(rows):
            if row is not None:
                data[place] = old[row]
        setattr(new, name, nn.Parameter(data))
    for name in ("out_channels", "out_features", "num_embeddings"):
        if hasattr(new, name):
            setattr(new, name, len(rows))
    return new
