"""The other engines, asked for the largest model that they make within a bound.

Torch-Pruning takes a ratio of widths and torch-kirigami a bound on parameters, so either is
bisected on a copy of the model until the bound is kept.  MACs are counted by PyTorch, for every
engine alike.  What criteria read of data comes without labels: the loss is the cross-entropy of
the model's own largest class.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from benchmarks.peers import engines, judge

CRITERIA = ("l1", "l2", "lamp", "fpgm", "bn_scale", "taylor")
"""Torch-Pruning's own; the last one depends on the draw of a seed."""

SCOPES = ("local", "global", "isomorphic")
STEPS = 10
"""Bisections of a ratio: to a thousandth."""

Cut = Callable[[nn.Module, float], nn.Module]
"""A copy of the model, which may change, and a share of it to remove → the smaller model."""


def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Of one forward, as PyTorch's own counter has it."""
    return prunus.report.measure_costs(model, inputs)["macs"]


def cut_within(model: nn.Module, cut: Cut, fits: Callable[[nn.Module], bool]) -> nn.Module:
    """The model of the least share removed, to a thousandth, that fits.

    Raises
    ------
    RuntimeError
        If no share up to 0.99 is enough.
    """
    low, high, found = 0.0, 0.99, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        smaller = cut(copy.deepcopy(model), middle)
        if fits(smaller):
            high, found = middle, smaller
        else:
            low = middle
    if found is None:
        raise RuntimeError("no share up to 0.99 is enough")
    return found.eval()


def torch_pruning(
    model: nn.Module,
    inputs: Tensor,
    limit: int,
    *,
    criterion: str,
    scope: str,
    batches: Sequence[Tensor] = (),
) -> nn.Module:
    """Torch-Pruning's model within a limit of MACs; only the layers of the outputs are ignored."""
    import torch_pruning as engine

    ignored = engines.find_output_layers(model, (inputs,), {})
    gradients = _differentiate(model, batches) if criterion == "taylor" else {}

    def cut(twin: nn.Module, share: float) -> nn.Module:
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients.get(name)
        pruner = engine.pruner.BasePruner(
            twin,
            inputs,
            importance=_criterion(criterion),
            pruning_ratio=share,
            global_pruning=scope != "local",
            isomorphic=scope == "isomorphic",
            ignored_layers=[twin.get_submodule(name) for name in ignored],
            # Its default dicts are shared by all pruners of a process, and it writes to them.
            out_channel_groups={},
            in_channel_groups={},
            num_heads={},
        )
        pruner.step()
        return twin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cut_within(model, cut, lambda m: count_macs(m, inputs) <= limit)


def _criterion(name: str) -> Any:
    from torch_pruning.pruner import importance as known

    return {
        "l1": lambda: known.MagnitudeImportance(p=1),
        "l2": lambda: known.MagnitudeImportance(p=2),
        "lamp": known.LAMPImportance,
        "fpgm": known.FPGMImportance,
        "bn_scale": known.BNScaleImportance,
        "taylor": known.TaylorImportance,
    }[name]()


def _differentiate(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss summed over all batches, as its Taylor criterion wants them."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        scores = model(batch)
        loss = nn.functional.cross_entropy(scores, scores.detach().argmax(1))
        found = torch.autograd.grad(loss, parameters)
        total = [t + g for t, g in zip(total, found, strict=True)]
    return dict(zip(names, total, strict=True))


def torch_kirigami(model: nn.Module, inputs: Tensor, limit: int, *, seconds: int) -> nn.Module:
    """torch-kirigami's model within a limit of MACs, as in its quick start.

    Raises
    ------
    judge.OutOfTime
        If it takes more seconds of processor time than allowed, all tries together.
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    def cut(twin: nn.Module, share: float) -> nn.Module:
        graph = DependencyGraph.build(twin, args=(inputs,))
        pruner = Pruner(twin, graph=graph)
        budget = ParameterBudget.from_ratio(twin, share)
        smaller: nn.Module = pruner.prune(
            pruner.discover_candidates(), budget=budget, strategy=Greedy(GroupMagnitude(p=2))
        )[0]
        return smaller

    with judge.limited(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cut_within(model, cut, lambda m: count_macs(m, inputs) <= limit)
