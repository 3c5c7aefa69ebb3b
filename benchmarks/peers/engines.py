"""The other engines, driven by their documented interfaces, asked for about half of a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.peers.judge import ENOUGH, Outcome, count_parameters, judge, tensors_of


def run_torch_pruning(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, share: float = 0.5
) -> Outcome:
    """Torch-Pruning with no help but the layers that produce the outputs, which it must ignore."""
    return _run_torch_pruning(model, args, kwargs, share, hints=False)


def run_torch_pruning_with_hints(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, share: float = 0.5
) -> Outcome:
    """The same with the head counts that the model's attributes tell, and whole heads to prune."""
    return _run_torch_pruning(model, args, kwargs, share, hints=True)


def run_torch_kirigami(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    share: float = 0.5,
    scored: bool = True,
) -> Outcome:
    """torch-kirigami as in its quick start; what it can't halve is asked for three quarters.

    ``scored=False`` calls all candidates alike: scoring does not finish on larger models.
    """

    def prune(m: nn.Module) -> nn.Module:
        from torch_kirigami import DependencyGraph
        from torch_kirigami.pruning import (
            Greedy,
            GroupMagnitude,
            ParameterBudget,
            PlanningError,
            Pruner,
        )

        graph = DependencyGraph.build(m, args=tuple(args), kwargs=dict(kwargs))
        pruner = Pruner(m, graph=graph)
        candidates = pruner.discover_candidates()
        strategy = Greedy(GroupMagnitude(p=2) if scored else _Alike())
        try:
            budget = ParameterBudget(max_params=int(count_parameters(m) * share))
            return pruner.prune(candidates, budget=budget, strategy=strategy)[0]
        except PlanningError:  # it asks for more than can be reached; we count less as success
            budget = ParameterBudget(max_params=int(count_parameters(m) * ENOUGH))
            return pruner.prune(candidates, budget=budget, strategy=strategy)[0]

    return judge(model, args, kwargs, prune)


PEERS: dict[str, Callable[..., Outcome]] = {
    "torch-pruning": run_torch_pruning,
    "torch-pruning+hints": run_torch_pruning_with_hints,
    "torch-kirigami": run_torch_kirigami,
}


class _Alike:
    """A metric of torch-kirigami that prefers nothing."""

    def score(self, context: Any, candidates: Sequence[Any], *, accepted_impact: Any) -> Any:
        return [0.0] * len(candidates)


def _run_torch_pruning(
    model: nn.Module, args: Any, kwargs: Any, share: float, *, hints: bool
) -> Outcome:
    import torch_pruning

    ignored = find_output_layers(model, args, kwargs)

    def prune(twin: nn.Module) -> nn.Module:
        heads = find_heads(twin) if hints else {}
        pruner = torch_pruning.pruner.BasePruner(
            twin,
            tuple(args) or dict(kwargs),
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[twin.get_submodule(name) for name in ignored],
            num_heads={layer: hint.count for layer, hint in heads.items()},
            # Its default dicts are shared by all pruners of a process, and it writes to them.
            out_channel_groups={},
            in_channel_groups={},
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
            head_pruning_ratio=share if heads else 0.0,
            forward_fn=lambda m, _: m(*args, **kwargs),
            output_transform=_differentiable,
        )
        pruner.step()
        for layer, hint in heads.items():
            hint.update(layer, pruner.num_heads.get(layer, hint.count))
        return twin

    return judge(model, args, kwargs, prune)


def _differentiable(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]


@dataclass(frozen=True)
class Heads:
    """How many heads a projection has, and which module says so in which attribute."""

    count: int
    owner: nn.Module
    attribute: str

    def update(self, layer: nn.Module, count: int) -> None:
        """What its examples do by hand after pruning: the owner's counts follow its layers."""
        if count == self.count or not self.attribute:
            return
        setattr(self.owner, self.attribute, count)
        for name in WIDTHS:
            value = vars(self.owner).get(name)
            if type(value) is int and value % self.count == 0:
                setattr(self.owner, name, value // self.count * count)


WIDTHS = ("all_head_size", "attn_dim", "inner_dim")
"""Attributes that hold heads times the size of one."""

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
WORDS = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "k", "value": "k", "kv": "k",
         "qkv": "q", "attn": "q", "wqkv": "q", "qv": "q"}  # fmt: skip
"""Words in a projection's name, and whether it has as many heads as queries or as keys."""


def find_heads(model: nn.Module) -> dict[nn.Module, Heads]:
    """The projections of every attention, by the names of its children and of its counts."""
    found: dict[nn.Module, Heads] = {}
    for owner in model.modules():
        queries, count = _stated(owner, COUNTS)
        if not count or isinstance(owner, nn.MultiheadAttention):
            continue
        keys, key_count = _stated(owner, KEY_COUNTS)
        for name, layer in owner.named_children():
            words = [WORDS[w] for w in re.split(r"[_\W]+", name.lower()) if w in WORDS]
            width = _features(layer)
            if not words or not width:
                continue
            plain = words[0] == "q" or not key_count
            attribute, heads = (queries, count) if plain else (keys, key_count)
            if width % heads == 0:
                found[layer] = Heads(heads, owner, attribute)
    return found


def _stated(owner: nn.Module, names: Sequence[str]) -> tuple[str, int]:
    """A count that a module states itself, or its config; the attribute only in the first case."""
    for name in names:
        if type(value := vars(owner).get(name)) is int:
            return name, value
    config = vars(owner).get("config")
    for name in names:
        if type(value := getattr(config, name, None)) is int:
            return "", value
    return "", 0


def _features(layer: nn.Module) -> int:
    """Outputs of a linear layer or a convolution, GPT-2's own kind included; else none."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, _ConvNd):
        return layer.out_channels
    return int(getattr(layer, "nf", 0)) if type(layer).__name__ == "Conv1D" else 0


def find_output_layers(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Names of the last layers on the ways to the outputs, where a dim of one holds their features.

    Found by walking back from every output in a copy, until a weight of a layer is met.
    """
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    owners: dict[int, list[str]] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        if _features(module) and isinstance(module.weight, nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    modules = dict(twin.named_modules(remove_duplicate=False))
    names: dict[str, None] = {}
    with torch.enable_grad():
        outputs = _differentiable(twin(*args, **kwargs))
    for output in outputs:
        for name in _last_layers(output.grad_fn, owners):
            # A view may split the features: of a detector, into anchors and what each predicts.
            if any(size > 1 and _features(modules[name]) % size == 0 for size in output.shape[1:]):
                names[name] = None
    return list(names)


def _last_layers(start: Any, owners: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Names of the first layers that are met from a node of autograd on."""
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        ahead = [following for following, _ in node.next_functions if following is not None]
        weights = [names for one in ahead if (names := owners.get(_weight_of(one)))]
        for names in weights:
            yield from names
        if weights:
            continue
        for following in ahead:
            if following not in seen:
                seen.add(following)
                queue.append(following)


def _weight_of(node: Any) -> int:
    """The parameter that a node hands over, as it is or transposed; else nothing."""
    while node is not None and type(node).__name__ in ("TBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
    return id(getattr(node, "variable", None))
