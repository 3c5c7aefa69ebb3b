"""Batch norms follow a cut without data, by as much as random inputs move.

The dense model and the cut one get the same random inputs.  These look like no data, so every
batch norm normalises them by their own statistics: behind each, channels then have the means and
spreads that training gave them, and what a cut changes in front of the next shows about as it
does on data.  The stored statistics move by that change, channel by channel:
``μ' = μ + (m_cut − m_dense) · σ / s_dense`` and ``σ'² = σ² · s_cut² / s_dense²``, with the mean m
and the spread s that random inputs have there.  Every half of the inputs says that once, and a norm
believes its channels as far as both say the same (the shrinkage of James and Stein).

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
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.recovery.norms import batch_norms
from prunus.tracer.inputs import rebuild_inputs, samples_in
from prunus.tracer.trace import quiet_run

SAMPLES = 4
"""Random inputs are so many samples together: the positions of one sample say nearly the same, and
with two samples MobileNetV2 at 90 % of its MACs loses nine points of what these give it back.
"""

BATCHES = 2
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
    halves
        Moments of the first and of the second half of the inputs.
    answer, statistics
        To the last of them, and what batch norms normalised it by.
    """

    halves: tuple[Moments, ...]
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
    own = {id(norm) for norm in batch_norms(model)}
    norms: dict[str, Any] = {name: m for name, m in model.named_modules() if id(m) in own}
    sums = {name: _Sums() for name in norms}
    halves: list[Moments] = []
    answer: Mapping[str, Tensor] = {}
    middle = len(calls) // 2
    with quiet_run(model):
        for name, norm in norms.items():
            norm.register_forward_pre_hook(sums[name], with_kwargs=True)
        for half in (calls[:middle], calls[middle:]):
            for call in half:
                answer = answer_to(model, call)
            halves.append({name: one.moments() for name, one in sums.items() if one.count})
        statistics = {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in norms.items()
        }
    return Looked(tuple(halves), answer, statistics)


def answer_to(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """What a model answers to a call; within a quiet run, which copies what it is given."""
    args, kwargs = call
    return outputs_of(model(*args, **kwargs))


@torch.no_grad()
def take_statistics(model: nn.Module, plan: Plan, dense: Moments) -> None:
    """Give a model that was cut the statistics of the dense one, in place."""
    for before, _, norm, stay in _norms_of(model, plan, dense):
        mean, variance = dense[before]
        norm.running_mean.copy_(mean[stay])
        norm.running_var.copy_(variance[stay])


@torch.no_grad()
def move_statistics(
    model: nn.Module, plan: Plan, dense: Sequence[Moments], cut: Sequence[Moments]
) -> None:
    """Move the stored statistics of a model that was cut, in place.

    Parameters
    ----------
    dense, cut
        Of the whole model, blocks that were dropped included, and of the smaller one, for both
        halves of the inputs.
    """
    for before, name, norm, stay in _norms_of(model, plan, dense[0]):
        shifts, factors = [], []
        alive = torch.ones_like(norm.running_var, dtype=torch.bool)
        for whole, small in zip(dense, cut, strict=True):
            if name in small:
                mean, variance = (values[stay] for values in whole[before])
                moved, spread = small[name]
                alive &= variance > DEAD * variance.mean()
                shifts.append((moved - mean) / variance.sqrt())
                factors.append((spread / variance).clamp(1 / MOST, MOST).log())
        if shifts and alive.any():
            stored = norm.running_var[alive].double()
            shift, factor = (_agreed(torch.stack(found)[:, alive]) for found in (shifts, factors))
            norm.running_mean[alive] += (shift * stored.sqrt()).to(norm.running_mean)
            norm.running_var[alive] = (stored * factor.exp()).to(norm.running_var)


def _agreed(estimates: Tensor) -> Tensor:
    """One estimate per channel out of several, nearer to that of all the less these agree."""
    found = estimates.mean(0)
    noise = estimates.var(0, correction=0).mean() / max(len(estimates) - 1, 1)
    spread = found.var(correction=0)
    weight = (1 - noise / spread).clamp_min(0) if spread > 0 else 0
    return found.mean() + weight * (found - found.mean())


def _norms_of(
    model: nn.Module, plan: Plan, dense: Moments
) -> Iterator[tuple[str, str, Any, list[int] | slice]]:
    """The batch norms of a model that was cut: the name before, the name, and what stays."""
    names, modules = Renaming(plan.drops), dict(model.named_modules())
    for before in dense:
        name = names.after(before)
        if name:
            stay = plan.keep.get(Axis(f"{name}.running_mean", 0))
            yield before, name, modules[name], slice(None) if stay is None else list(stay)


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
        """The mean and the variance over all batches since the last time."""
        mean, square = self.mean / self.count, self.square / self.count
        self.count, self.mean, self.square = 0, 0.0, 0.0
        return mean, (square - mean.square()).clamp_min(0)
