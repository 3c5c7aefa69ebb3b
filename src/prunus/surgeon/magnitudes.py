"""The magnitudes of weight norms, which make up for what their directions lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from prunus.surgeon.slicing import slice_tensor
from prunus.tracer.renormalised import find_weight_norms, norms_of


def make_up(
    model: nn.Module,
    state: Mapping[str, Tensor],
    cut: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """New magnitudes, by name, under which the kept weights stay what they were.

    Parameters
    ----------
    state, cut
        The model's tensors, and those of them that are cut, cut.
    kept
        By tensor and dim, the positions that are kept.

    A direction of length 0 gives weights that are not defined; its magnitude stays as it is.
    """
    for norm in find_weight_norms(model, state):
        axes = kept.get(norm.direction, {})
        if not axes or (norm.dim != -1 and set(axes) == {norm.dim}):
            continue  # each kept norm is the same as before
        along = {norm.dim: axes[norm.dim]} if norm.dim in axes else {}
        before = slice_tensor(norms_of(state[norm.direction], norm.dim), along)
        after = norms_of(cut[norm.direction], norm.dim)
        magnitude = cut.get(norm.magnitude, state[norm.magnitude]).detach()
        ratio = torch.where(before > 0, after / before, 1.0).reshape(magnitude.shape)
        yield norm.magnitude, (magnitude * ratio).to(magnitude)
