"""Batch norms follow a cut without data, by as much as random inputs move.

The dense model and the cut one get the same random inputs.  These look like no data, so every
batch norm normalises them by their own statistics: behind each, channels then have the means and
spreads that training gave them, and what a cut changes in front of the next shows about as it
does on data.  The stored statistics move by that change, channel by channel:
``μ' = μ + (m_cut − m_dense) · σ / s_dense`` and ``σ'² = σ² · s_cut² / s_dense²``, with the mean m
and the spread s that random inputs have there.

Whether that helps shows on the last of these inputs: with the statistics by which the dense model
normalises it, and with these moved, by the same change, the cut model is compared with the dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import outputs_of
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.graph.renaming import Renaming
from prunus.recovery.norms import batch_norms
from prunus.tracer.inputs import rebuild_inputs, samples_in
from prunus.tracer.trace import quiet_run

SAMPLES = 8
"""Random inputs are so many samples together: the positions of one sample say nearly the same, and
with two samples MobileNetV2 at 90 % of its MACs loses nine points of what eight give it back.
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


@dataclass(frozen=True)
class Looked:
    """What random inputs showed of a model in which batch norms normalise by each of them.

    Attributes
    ----------
    moments
        Of all inputs.
    answer, statistics
        To the last of them, and what batch norms normalised it by.
    """

    moments: Moments
    answer: Mapping[str, Tensor]
    statistics: Moments


def random_calls(plan: Plan, model: nn.Module, *, seed: int = 0) -> list[Call]:
    """Seeded normal numbers in the shapes of the trace, and integers within their bounds.

    Empty where the plan does not describe them, or the model has no values.
    """
    spec = None if plan.traced is None else plan.traced.inputs
    if spec is None or any(tensor.is_meta for tensor in model.parameters()):
        return []
    first = rebuild_inputs(spec, model, seed=seed * SAMPLES)
    count = max(BATCHES, math.ceil(SAMPLES / max(samples_in(*first) or 1, 1)))
    others = (rebuild_inputs(spec, model, seed=seed * SAMPLES + n) for n in range(1, count))
    return [first, *others]


def look(model: nn.Module, calls: Sequence[Call]) -> Looked:
    """Run calls; the model is put back as it was."""
    norms = {id(norm): norm for norm in batch_norms(model)}
    sums = {name: _Sums() for name, m in model.named_modules() if id(m) in norms}
    answer: Mapping[str, Tensor] = {}
    with quiet_run(model):
        modules = dict(model.named_modules())
        for name, one in sums.items():
            modules[name].register_forward_pre_hook(one, with_kwargs=True)
        for call in calls:
            answer = answer_to(model, call)
        statistics = {
            name: (modules[name].running_mean.clone(), modules[name].running_var.clone())
            for name in sums
        }
    moments = {name: one.moments() for name, one in sums.items() if one.count}
    return Looked(moments, answer, statistics)


def answer_to(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """What a model answers to a call; within a quiet run, which copies what it is given."""
    args, kwargs = call
    return outputs_of(model(*args, **kwargs))


@torch.no_grad()
def take_statistics(model: nn.Module, plan: Plan, dense: Moments) -> None:
    """Give a model that was cut the statistics of the dense one, in place."""
    for _, norm, (mean, variance) in _norms_of(model, plan, dense):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@torch.no_grad()
def move_statistics(model: nn.Module, plan: Plan, dense: Moments, cut: Moments) -> None:
    """Move the stored statistics of a model that was cut, in place.

    Parameters
    ----------
    dense, cut
        Of the whole model, blocks that were dropped included, and of the smaller one.
    """
    for name, norm, (mean, variance) in _norms_of(model, plan, dense):
        if name not in cut:
            continue
        moved, spread = cut[name]
        alive = variance > DEAD * variance.mean()
        stored = norm.running_var.double()
        shift = (moved - mean) * (stored / variance).sqrt()
        factor = (spread / variance).clamp(1 / MOST, MOST)
        norm.running_mean += torch.where(alive, shift, 0).to(norm.running_mean)
        norm.running_var.copy_(torch.where(alive, stored * factor, stored))


def _norms_of(
    model: nn.Module, plan: Plan, dense: Moments
) -> Iterator[tuple[str, Any, tuple[Tensor, Tensor]]]:
    """The batch norms of a model that was cut, with what the dense one has for what stays."""
    names, modules = Renaming(plan.drops), dict(model.named_modules())
    for before, values in dense.items():
        name = names.after(before)
        if name:
            stay = plan.keep.get(Axis(f"{name}.running_mean", 0))
            mean, variance = values if stay is None else (one[list(stay)] for one in values)
            yield name, modules[name], (mean, variance)


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
        mean = rows.mean(1).double()  # a norm reads once: var_mean takes seventy times as long
        square = torch.linalg.vector_norm(rows, dim=1).double().square() / count
        if count >= FEW:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((square - mean.square()).clamp_min(0))
        self.count += count
        self.mean = self.mean + count * mean
        self.square = self.square + count * square

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance over all batches."""
        mean: Tensor = self.mean / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(0)
