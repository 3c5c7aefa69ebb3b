"""Batch norms follow a cut without data, by as much as random inputs move.

The dense model and the cut one get the same random inputs.  These look like no data, so every
batch norm normalises them by their own statistics: behind each, channels then have the means and
spreads that training gave them, and what a cut changes in front of the next shows about as it
does on data.  The stored statistics move by that change, channel by channel:
``μ' = μ + (m_cut − m_dense) · σ / s_dense`` and ``σ'² = σ² · s_cut² / s_dense²``, with the mean m
and the spread s that random inputs have there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.graph.renaming import Renaming
from prunus.recovery.norms import batch_norms
from prunus.surgeon.snapshot import Snapshot
from prunus.tracer.inputs import rebuild_inputs, samples_in
from prunus.tracer.trace import quiet_run

SAMPLES = 8
"""Random inputs are so many samples together: with four or six the accuracy is up to two points
lower, on an average of ten draws.
"""

BATCHES = 4
"""At least so many batches of the traced shape, however many samples each has."""

FEW = 16
"""Of fewer values per channel a batch norm does not take the statistics that it normalises by."""

MOST = 100.0
"""A variance grows or shrinks by this factor at most."""

DEAD = 1e-6
"""Channels of less variance than this share of their norm's mean say nothing, and stay."""

Call = tuple[Any, Any]
"""The arguments and the keyword arguments of one call."""

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""The mean and the variance of what each batch norm reads, by the norm's path; (channels,)."""


def random_calls(plan: Plan, model: nn.Module, *, seed: int = 0) -> list[Call]:
    """Seeded normal numbers in the shapes that the model was traced with; integers are zeros.

    Empty where the plan does not describe them, or the model has no values.
    """
    spec = None if plan.traced is None else plan.traced.inputs
    if spec is None or any(tensor.is_meta for tensor in model.parameters()):
        return []
    first = rebuild_inputs(spec, model, seed=seed * SAMPLES)
    count = max(BATCHES, math.ceil(SAMPLES / max(samples_in(*first) or 1, 1)))
    others = (rebuild_inputs(spec, model, seed=seed * SAMPLES + n) for n in range(1, count))
    return [first, *others]


def moments_of(model: nn.Module, calls: Sequence[Call]) -> Moments:
    """What batch norms read when each normalises by the batch's own statistics.

    The model is put back as it was.
    """
    norms = {id(norm) for norm in batch_norms(model)}
    sums = {name: _Sums() for name, m in model.named_modules() if id(m) in norms}
    before = Snapshot(model)
    try:
        for name, one in sums.items():
            model.get_submodule(name).register_forward_pre_hook(one, with_kwargs=True)
        with quiet_run(model):
            for call in calls:
                args, kwargs = copy.deepcopy(call)  # a forward may write into its input
                model(*args, **kwargs)
    finally:
        before.restore()
    return {name: one.moments() for name, one in sums.items() if one.count}


@torch.no_grad()
def move_statistics(model: nn.Module, plan: Plan, dense: Moments, cut: Moments) -> None:
    """Move the stored statistics of a model that was cut, in place.

    Parameters
    ----------
    dense, cut
        Of the whole model, blocks that were dropped included, and of the smaller one.
    """
    names = Renaming(plan.drops)
    before = {later: found for name, found in dense.items() if (later := names.after(name))}
    modules = dict(model.named_modules())
    for name in before.keys() & cut.keys():
        norm: Any = modules[name]
        stay = plan.keep.get(Axis(f"{name}.running_mean", 0), range(len(before[name][0])))
        mean, variance = (values[list(stay)] for values in before[name])
        moved, spread = cut[name]
        alive = variance > DEAD * variance.mean()
        stored = norm.running_var.double()
        shift = (moved - mean) * (stored / variance).sqrt()
        factor = (spread / variance).clamp(1 / MOST, MOST)
        norm.running_mean += torch.where(alive, shift, 0).to(norm.running_mean)
        norm.running_var.copy_(torch.where(alive, stored * factor, stored))


class _Sums:
    """A hook before a batch norm: sums up what it reads, and lets it normalise by that."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.square: Any = 0.0

    def __call__(self, norm: Any, args: Any, kwargs: Any) -> None:
        x: Tensor = (*args, *kwargs.values())[0]
        count = x.numel() // x.shape[1]
        rows = x.detach().transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        mean = rows.mean(1)
        variance = (rows - mean[:, None]).square_().mean(1)  # var_mean takes ten times as long
        if count >= FEW:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        variance, mean = variance.double(), mean.double()
        self.count += count
        self.mean = self.mean + count * mean
        self.square = self.square + count * (variance + mean.square())

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance over all batches."""
        mean: Tensor = self.mean / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(0)
