"""The positions of a tensor that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def slice_tensor(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The positions that stay, dim by dim; dense, in the tensor's own memory format."""
    sliced = tensor.detach()
    for dim, stay in keep.items():
        sliced = sliced.index_select(dim, stay.to(sliced.device))
    if tensor.layout != torch.strided:
        return sliced
    # Outermost dim first.  The stride of a dim of size 1 means nothing: it is put last of its like.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1))
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return sliced.permute(order).contiguous().permute(back)
