"""Batch norms follow a cut without data: means in closed form, variances by random inputs.

*Means.*  Behind a batch norm, channels have the mean β and the spread γ that training gave them.
With normal values of those, what an elementwise operator makes of them is known, and so is what a
convolution loses with the channels that are removed, ``Σ W E x``: the next norm subtracts that
much less.

*Variances.*  The dense model and the cut one get the same random inputs.  These look like no data,
so every batch norm normalises them by their own statistics, and what a cut changes in front of the
next shows about as it does on data: ``σ'² = σ² · s_cut² / s_dense²``, with the spread s that random
inputs have there.  Each of the inputs says that once, and a norm believes its channels as far as
all say the same (the shrinkage of James and Stein).  Means that are not known in closed form
(behind pooling or attention, or where blocks are dropped) move likewise, by
``(m_cut − m_dense) · σ / s_dense``.

Whether that helps shows on the last of these inputs: with the statistics by which the dense model
normalises it, and with these moved, by the same change, the cut model is compared with the dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.calibration.batches import outputs_of
from prunus.graph.axis import Axis
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.graph.program import Node, Ref, refs_in, state_of
from prunus.recovery.norms import batch_norms
from prunus.tracer.dataflow import name_of
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.registry import call_bound
from prunus.tracer.trace import quiet_run

INPUTS = 2
"""Random inputs of the traced shape."""

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
    runs
        Moments of each input.
    answer, statistics
        To the last of them, and what batch norms normalised it by.
    """

    runs: tuple[Moments, ...]
    answer: Mapping[str, Tensor]
    statistics: Moments


def random_calls(plan: Plan, model: nn.Module, *, seed: int = 0) -> list[Call]:
    """Seeded normal numbers in the shapes of the trace, and integers within their bounds.

    Empty where the plan does not describe them, or the model has no values.
    """
    spec = None if plan.traced is None else plan.traced.inputs
    if spec is None or any(tensor.is_meta for tensor in model.parameters()):
        return []
    return [rebuild_inputs(spec, model, seed=seed * INPUTS + n) for n in range(INPUTS)]


def look(model: nn.Module, calls: Sequence[Call]) -> Looked:
    """Run calls; the model is put back as it was."""
    own = {id(norm) for norm in batch_norms(model)}
    norms: dict[str, Any] = {name: m for name, m in model.named_modules() if id(m) in own}
    sums = {name: _Sums() for name in norms}
    runs: list[Moments] = []
    answer: Mapping[str, Tensor] = {}
    with quiet_run(model):
        for name, norm in norms.items():
            norm.register_forward_pre_hook(sums[name], with_kwargs=True)
        for call in calls:
            answer = answer_to(model, call)
            runs.append({name: one.moments() for name, one in sums.items() if one.count})
        statistics = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}
    return Looked(tuple(runs), answer, statistics)


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


class Move(NamedTuple):
    """How the statistics of a norm change: μ' = μ + added + shift · σ and σ'² = factor · σ²."""

    norm: Any
    added: Tensor
    shift: Tensor
    factor: Tensor


@torch.no_grad()
def moves_of(
    model: nn.Module,
    plan: Plan,
    dense: Sequence[Moments],
    cut: Sequence[Moments],
    lost: Mapping[str, Tensor],
) -> list[Move]:
    """How the stored statistics of a model that was cut change.

    Parameters
    ----------
    dense, cut
        Of the whole model, blocks that were dropped included, and of the smaller one, by input.
    lost
        What :func:`lost_means` found.
    """
    found = []
    for before, name, norm, stay in _norms_of(model, plan, dense[0]):
        pairs = [(whole[before], own[name]) for whole, own in zip(dense, cut, strict=True)
                 if name in own]  # fmt: skip
        added, shift, factor = torch.zeros(
            3, len(norm.running_var), dtype=torch.float64, device=norm.running_var.device
        )
        known = lost.get(f"{before}.running_mean")
        if known is not None:
            added = known[stay]
        if pairs:
            _measure(pairs, stay, factor, shift if known is None else None)
        found.append(Move(norm, added, shift, factor.exp()))
    return found


def _measure(
    pairs: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    stay: list[int] | slice,
    factor: Tensor,
    shift: Tensor | None,
) -> None:
    """Write by how much variances move, as logarithms, and means, in spreads, if they are asked."""
    variance = torch.stack([whole[1][stay] for whole, _ in pairs])
    alive = (variance > DEAD * variance.mean(1, keepdim=True)).all(0)
    if alive.any():
        ratios = torch.stack([own[1] for _, own in pairs]) / variance
        factor[alive] = _agreed(ratios.clamp(1 / MOST, MOST).log()[:, alive])
    if shift is not None and alive.any():
        moved = torch.stack([own[0] - whole[0][stay] for whole, own in pairs]) / variance.sqrt()
        shift[alive] = _agreed(moved[:, alive])


@torch.no_grad()
def move_statistics(moves: Sequence[Move]) -> None:
    """Move statistics, in place."""
    for norm, added, shift, factor in moves:
        stored = norm.running_var.double()
        norm.running_mean += (added + shift * stored.sqrt()).to(norm.running_mean)
        norm.running_var.copy_(stored * factor)


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


@torch.no_grad()
def lost_means(graph: CouplingGraph, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """What the means of what batch norms read lose by a cut, where that is known in closed form.

    Returns
    -------
    dict
        Name of the running mean → what is added to it, of all channels of the model as it is.
    """
    channels = _Channels(graph, model, plan)
    for node in graph.program.nodes:
        channels.run(node)
    return channels.found


_NORMAL = torch.special.ndtri((torch.arange(32, dtype=torch.float64) + 0.5) / 32)[:, None]
"""Quantiles of the standard normal, shape ``(32, 1)``."""

_MOVES = frozenset({"cat", "split", "split_with_sizes", "slice"})


class _Channels:
    """Follows means and variances of channels, dim 1 of values, through a program.

    Attributes
    ----------
    found
        See :func:`lost_means`.
    """

    def __init__(self, graph: CouplingGraph, model: nn.Module, plan: Plan) -> None:
        self.found: dict[str, Tensor] = {}
        self._names, self._keep = graph.program.state, plan.keep
        self._state, _ = state_of(model)
        self._known: dict[int, Tensor] = {}  # mean and variance, shape (2, channels)
        self._lost: dict[int, Tensor] = {}  # of outputs of convolutions

    def run(self, node: Node) -> None:
        """Take in what an operator makes."""
        name = name_of(node)
        if "batch_norm" in name:
            self._normalise(node.args, node.outputs[0])
        elif name == "convolution":
            self._convolve(node.args, node.outputs[0])
        else:
            read = [ref.value for ref in refs_in(node.args)]
            made = self._made(node, len(read)) if read and self._known.keys() >= set(read) else []
            self._known.update(zip(node.outputs, made, strict=False))

    def _made(self, node: Node, read: int) -> Sequence[Tensor]:
        """Means and variances of what is made of known values; terms of a sum are independent."""
        args = tree_map(self._value, dict(node.args))
        if name_of(node) in _MOVES and args.get("dim") == 1:
            made = call_bound(node.target, args)
            return made if isinstance(made, (list, tuple)) else [made]
        if torch.Tag.pointwise in node.target.tags and read == 1:
            return [_bend(node, args)]
        if name_of(node) not in ("add", "add_") or args.get("alpha", 1) != 1:
            return []
        first, second = args["self"], args["other"]
        return [first + second] if first.shape == second.shape else []

    def _value(self, argument: Any) -> Any:
        return self._known[argument.value] if isinstance(argument, Ref) else argument

    def _parameter(self, argument: Any) -> Tensor | None:
        name = self._names.get(argument.value, "") if isinstance(argument, Ref) else ""
        return self._state[name].detach() if name else None

    def _normalise(self, args: Mapping[str, Any], out: int) -> None:
        mean, weight, bias = map(self._parameter, map(args.get, ("running_mean", "weight", "bias")))
        if mean is None:
            return
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        self._known[out] = torch.stack([bias, weight.square()]).double()
        lost = self._lost.get(args["input"].value)
        if lost is not None:
            self.found[self._names[args["running_mean"].value]] = lost

    def _convolve(self, args: Mapping[str, Any], out: int) -> None:
        known = self._known.get(args["input"].value)
        weight, groups = self._parameter(args["weight"]), args["groups"]
        if known is None or weight is None or args["transposed"]:
            return
        kept = self._keep.get(Axis(self._names[args["weight"].value], 1))
        self._lost[out] = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        if kept is not None:
            mean = known[0].view(groups, 1, -1).clone()
            mean[:, :, list(kept)] = 0
            taps = weight[0, 0].numel()
            each = mean.to(weight.dtype).repeat_interleave(taps, 2)
            lost = weight.reshape(groups, -1, each.shape[2]) @ each.mT
            self._lost[out] -= lost.flatten().double()


def _bend(node: Node, args: dict[str, Any]) -> Tensor:
    """What an elementwise operator makes of channels of normal values."""
    key = next(key for key, value in args.items() if isinstance(value, Tensor))
    mean, variance = args[key]
    values = mean + variance.sqrt() * _NORMAL.to(mean.device)
    made = call_bound(node.target, {**args, key: values}).double()
    return torch.stack([made.mean(0), made.var(0, correction=0)])
