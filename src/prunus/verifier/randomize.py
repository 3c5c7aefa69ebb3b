"""Randomize what initialisation left constant, so that verification is not vacuous.

A network at initialisation ignores much of what could be wrong with it: residual branches that
end in zeros, batch norms without statistics, attention that looks everywhere alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, state_of, stored, tensors_of
from prunus.tracer.outputs import answer_of
from prunus.tracer.softmax_scale import Fixed, find_attentions
from prunus.tracer.trace import forget_caches, quiet, quiet_run, trace
from prunus.verifier.case import gradients_of
from prunus.verifier.replay import Replay

FAINT = 0.3
"""A weight whose outputs have less than this times the spread of its inputs is made louder."""

ROUNDS = 2
"""How often attention is sharpened where batch norms follow it, whose statistics that changes."""

MASKED = -1e4
"""Logits below this stand for positions that an attention does not see."""

SMALL = 0.1
"""A constant parameter below this is a switched-off branch, not a scale."""


@dataclass(frozen=True)
class Known:
    """What is known of a model once its weights are random.

    Attributes
    ----------
    answer
        What it answers; None where that was not seen.
    gradients, replayed
        Of a gated replay (:func:`prunus.verifier.case.gradients_of`), where one was run.
    """

    answer: dict[str, Tensor] | None = None
    gradients: Tensor | None = None
    replayed: dict[str, Tensor] | None = None


@checks_options
def randomize(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    seed: int = 0,
    graph: CouplingGraph | None = None,
    gated: bool = False,
) -> Known:
    """Fill what initialisation left constant and randomise batch statistics, in place.

    Constant weights become random, constant scales are drawn from [0.5, 1.5], constant biases
    from N(0, 0.1²); faint weights are made louder.  Batch norms get the statistics of the
    example inputs, perturbed.  Queries are multiplied until attention logits have a standard
    deviation of at least 1.

    Parameters
    ----------
    graph
        A trace of the model on these inputs, where there is one.
    gated
        Take gradients by gates in the run that sharpens attention, if nothing changes after it.
    """
    generator = torch.Generator().manual_seed(seed)
    forget_caches(model, args, kwargs)  # of what was computed from the weights as they were
    with torch.no_grad():
        _fill_weights(model, generator)
        answer = _set_batch_norms(model, args, kwargs, generator)
        normalised = any(map(_has_statistics, _hookable(model)))
        found = Known()
        for _ in range(ROUNDS if normalised else 1):
            sharpened, found = _sharpen(model, args, kwargs, graph, gated and not normalised)
            if not sharpened:
                break
            # Sharper attention is louder.
            answer = _set_batch_norms(model, args, kwargs, generator)
        if answer is None and found.replayed and not _are_constant(found.replayed):
            return found if found.gradients is not None else Known()
        return Known(_make_outputs_vary(model, args, kwargs, answer))


def _fill_weights(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and _is_constant(parameter):
            parameter.copy_(_fill(name, parameter, generator))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _amplify(module.weight)


def _is_constant(parameter: Tensor) -> bool:
    first = parameter.flatten()[:64]  # which tells most that are not, without reading all
    return bool((first == first[0]).all()) and bool((parameter == first[0]).all())


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    value = float(parameter.flatten()[0])
    noise = torch.randn(parameter.shape, generator=generator)
    scale = 0.5 + torch.rand(parameter.shape, generator=generator)
    if abs(value) >= SMALL:
        filled = value * scale
    elif "bias" in name.rpartition(".")[2]:
        filled = SMALL * noise
    elif sum(size > 1 for size in parameter.shape) > 1:
        filled = noise / max(parameter[0].numel(), 1) ** 0.5
    else:
        filled = scale
    return filled.to(parameter)


def _amplify(weight: Tensor) -> None:
    """Multiply weights that are too small for their fan-in, or what they compute is drowned."""
    values = weight.detach()
    spread = values if values.dtype in (torch.float32, torch.float64) else values.float()
    gain = float(spread.std()) * weight[0].numel() ** 0.5
    if 0 < gain < FAINT and not weight.is_meta:
        weight.mul_(FAINT / gain)


def _make_outputs_vary(
    model: nn.Module, args: Any, kwargs: Any, answer: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Turn the sign of the last layer where every output is one constant, as behind a dead ReLU.

    Returns what the model answers, unless the sign was turned.
    """
    if answer is not None and not _are_constant(answer):
        return answer
    last: list[nn.Module] = []

    def ran(module: nn.Module, *_: Any) -> None:
        if isinstance(stored(module, "weight"), Tensor) and not _has_statistics(module):
            last.append(module)

    handles = [module.register_forward_hook(ran) for module in _hookable(model)]
    answer = _answer(model, args, kwargs, handles)
    if not (last and _are_constant(answer)):
        return answer
    for parameter in last[-1].parameters(recurse=False):
        parameter.neg_()
    return None


def _are_constant(answer: Mapping[str, Tensor]) -> bool:
    outputs = [tensor for tensor in answer.values() if tensor.is_floating_point()]
    return bool(outputs) and all(
        not t.numel() or bool((t == t.flatten()[0]).all()) for t in outputs
    )


def _hookable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _answer(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], handles: Iterable[Any]
) -> dict[str, Tensor]:
    """What a model answers with hooks on it, which are removed."""
    try:
        with quiet_run(model):
            return answer_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()


def _has_statistics(module: nn.Module) -> bool:
    names = ("running_mean", "running_var")
    return all(isinstance(stored(module, name), Tensor) for name in names)


def _set_batch_norms(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor] | None:
    """Perturbed statistics of the example inputs, layer by layer in the order in which they run.

    Each layer sees what the perturbed ones before it answer; perturbed all at once, deep
    networks with attention run away.  So what the model answers at the end is what it would
    answer again, if each has run once; else None is returned.
    """
    settled: Counter[nn.Module] = Counter()
    statistics: dict[Any, tuple[Tensor, Tensor]] = {}

    def settle(module: Any, inputs: tuple[Any, ...]) -> None:
        values = inputs[0] if inputs else None
        if isinstance(values, Tensor) and values.dim() > 1 and values.is_floating_point():
            mean, variance = _by_channel(values)
            if mean.shape == module.running_mean.shape:
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance + 0.1 * variance.mean() + 1e-6)
                _perturb(module, generator)
                statistics[module] = module.running_mean.clone(), module.running_var.clone()
                settled[module] += 1

    normalising = [module for module in _hookable(model) if _has_statistics(module)]
    handles = [module.register_forward_pre_hook(settle) for module in normalising]
    answer = _answer(model, args, kwargs, handles) if handles else None
    for module, (mean, variance) in statistics.items():  # a quiet run puts back what it wrote
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
    for module in normalising:
        if module not in settled:
            _perturb(module, generator)
    return answer if all(settled[module] == 1 for module in normalising) else None


def _by_channel(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over everything but dim 1."""
    rest = [0, *range(2, values.dim())]
    mean = values.mean(rest, keepdim=True)
    variance = (values - mean).square_().mean(rest)  # var takes ten times as long
    return mean.flatten(), variance


def _perturb(module: Any, generator: torch.Generator) -> None:
    shape = module.running_mean.shape
    spread = module.running_var.sqrt()
    module.running_mean += 0.2 * spread * torch.randn(shape, generator=generator).to(spread)
    module.running_var *= (0.7 + 0.7 * torch.rand(shape, generator=generator)).to(spread)


def _sharpen(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    graph: CouplingGraph | None,
    gated: bool,
) -> tuple[bool, Known]:
    """Multiply the weights of queries whose attention logits are too alike to matter.

    Whether any were, and what about the model answers, if it has attentions.  The logits of one
    replay are multiplied in place of their weights, so that later attentions see what the earlier
    ones have become; the weights, which gradients need as they were, follow at the end.
    """
    graph = trace(model, args, kwargs) if graph is None else graph
    attentions = find_attentions(graph.program)
    if not attentions:
        return False, Known()
    state, _ = state_of(model)
    sharpening = _Sharpening(attentions, state)
    found = Known()
    with quiet():
        replay = Replay(graph, state, [t.detach() for _, t in tensors_of([args, kwargs])])
        if gated and all("query" in node.args for node in attentions):  # else a bias is added later
            found = Known(None, *gradients_of(replay, sharpening.alter))
        if found.replayed is None or sharpening.shared:
            sharpening.factors.clear()
            found = Known(replayed=replay.run(graph.all_kept, alter=sharpening.alter))
    return sharpening.write(), found


class _Sharpening:
    """Multiplies the queries of attentions in a replay, and afterwards the weights they come from.

    Attributes
    ----------
    factors
        By the positions of a weight, what to multiply it by.
    shared
        Whether a weight is that of several attentions: what the earlier of them were multiplied by
        in the replay is then not what the weight says in the end.
    """

    def __init__(self, attentions: Mapping[Node, Fixed], state: Mapping[str, Tensor]) -> None:
        self._attentions, self._state = attentions, state
        self.factors: dict[tuple[str, int, tuple[int, ...]], float] = {}
        self.shared = False

    def alter(self, node: Node, bound: dict[str, Any]) -> None:
        targets = [
            one for one in self._attentions.get(node, ()) if self._state[one[0]].is_floating_point()
        ]
        if not targets:
            return
        operand = "self" if "self" in bound else "query"
        before = self.factors.get(targets[0], 1.0)
        values = _louder(bound[operand], before)
        with torch.no_grad():
            factor = before * _factor({**bound, operand: values})
        self.shared = self.shared or (before != factor and targets[0] in self.factors)
        bound[operand] = _louder(bound[operand], factor)
        self.factors.update(dict.fromkeys(targets, factor))

    def write(self) -> bool:
        """Multiply the weights; whether any were."""
        for (name, dim, positions), factor in self.factors.items():
            if factor > 1:
                at = torch.as_tensor(positions, device=self._state[name].device)
                scaled = self._state[name].index_select(dim, at) * factor
                self._state[name].index_copy_(dim, at, scaled)
        return any(factor > 1 for factor in self.factors.values())


def _louder(values: Tensor, factor: float) -> Tensor:
    return torch.where(values > MASKED, values * factor, values) if factor > 1 else values


def _factor(bound: Mapping[str, Any]) -> float:
    """What to multiply the query of an attention by."""
    logits = bound.get("self")
    if logits is None:
        logits = _logits(bound["query"], bound["key"], bound.get("scale"))
    finite = logits[torch.isfinite(logits) & (logits > MASKED)]
    spread = float(finite.double().std()) if finite.numel() > 1 else 0.0
    return min(max(1.2 / spread, 1.0), 1e3) if spread > 0 else 1.0


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """What a fused attention takes the softmax of, mask apart; heads may share a key."""
    if key.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
