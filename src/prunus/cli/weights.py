"""Write a model's weights: plain safetensors, until whole models can be saved."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from prunus.report.documents import replace_file


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict; the file is the old one or the new one, never half of it.

    Tied tensors are written once, under their first name; the metadata entry ``"tied"`` maps the
    other names to it, as JSON.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):  # a module's extra state may be anything
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = place if tensor.numel() else id(tensor)
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            # A clone, since safetensors refuses tensors that share memory in other ways.
            tensors[name] = tensor.detach().clone().contiguous()
    # A single entry: safetensors writes several in any order, and bytes are to be reproducible.
    metadata = {"tied": json.dumps(tied, sort_keys=True)}
    replace_file(path, lambda draft: save_file(tensors, draft, metadata))
