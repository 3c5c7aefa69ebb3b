"""Make a network listen, so that a comparison proves something.

A network at initialisation ignores much of what could be wrong with it: residual branches that
end in zeros, batch norms without statistics, attention that looks everywhere alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.errors import checks_options
from prunus.graph.program import Program, state_of, stored
from prunus.tracer.adapters import adapted
from prunus.tracer.capture import PASSIVE
from prunus.tracer.outputs import answer_of
from prunus.tracer.registry import bind
from prunus.tracer.softmax_scale import find_attentions
from prunus.tracer.trace import forget_caches, plain_kernels, quiet_run, trace

FAINT = 0.3
"""A weight whose outputs have less than this times the spread of its inputs is made louder."""

ROUNDS = 2
"""How often attention is sharpened; what an early layer changes, later ones hear."""

SMALL = 0.1
"""A constant parameter below this is a switched-off branch, not a scale."""


@checks_options
def listen(model: nn.Module, args: Any, kwargs: Mapping[str, Any], *, seed: int = 0) -> None:
    """Fill what initialisation left constant and randomise batch statistics, in place.

    Constant weights become random, constant scales are drawn from [0.5, 1.5], constant biases
    from N(0, 0.1²); faint weights are made louder.  Batch norms get the statistics of the
    example inputs, perturbed.  Queries are multiplied until attention logits have a standard
    deviation of at least 1.
    """
    randomise(model, args, kwargs, seed=seed)


def randomise(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    seed: int = 0,
    program: Program | None = None,
) -> dict[str, Tensor] | None:
    """What :func:`listen` does; returns what the model answers then, None where that is not known.

    Parameters
    ----------
    program
        A trace of the model on these inputs, where there is one; it is not traced again where
        it runs the same operators.
    """
    generator = torch.Generator().manual_seed(seed)
    forget_caches(model, args, kwargs)  # of what was computed from the weights as they were
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and _is_constant(parameter):
                parameter.copy_(_fill(name, parameter, generator))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _speak_up(module.weight)
        answer = _settle_batch_norms(model, args, kwargs, generator)
        for _ in range(ROUNDS):
            if not _sharpen(model, args, kwargs, program):
                break
            # Sharper attention is louder.
            answer = _settle_batch_norms(model, args, kwargs, generator)
        return _wake(model, args, kwargs, answer)


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


def _speak_up(weight: Tensor) -> None:
    """Multiply weights that are too small for their fan-in, or what they compute is drowned."""
    values = weight.detach()
    spread = values if values.dtype in (torch.float32, torch.float64) else values.float()
    gain = float(spread.std()) * weight[0].numel() ** 0.5
    if 0 < gain < FAINT and not weight.is_meta:
        weight.mul_(FAINT / gain)


def _wake(
    model: nn.Module, args: Any, kwargs: Any, answer: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Turn the sign of the last layer where every output is one constant, as behind a dead ReLU.

    Returns what the model answers, unless the sign was turned.
    """
    if answer is not None and not _is_asleep(answer):
        return answer
    last: list[nn.Module] = []

    def ran(module: nn.Module, *_: Any) -> None:
        if isinstance(stored(module, "weight"), Tensor) and not _has_statistics(module):
            last.append(module)

    handles = [module.register_forward_hook(ran) for module in _hookable(model)]
    try:
        with quiet_run(model):
            answer = answer_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if not (last and _is_asleep(answer)):
        return answer
    for parameter in last[-1].parameters(recurse=False):
        parameter.neg_()
    return None


def _is_asleep(answer: Mapping[str, Tensor]) -> bool:
    outputs = [tensor for tensor in answer.values() if tensor.is_floating_point()]
    return bool(outputs) and all(
        not t.numel() or bool((t == t.flatten()[0]).all()) for t in outputs
    )


def _hookable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _has_statistics(module: nn.Module) -> bool:
    names = ("running_mean", "running_var")
    return all(isinstance(stored(module, name), Tensor) for name in names)


def _settle_batch_norms(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor] | None:
    """Perturbed statistics of the example inputs, layer by layer in the order in which they run.

    Each layer sees what the perturbed ones before it answer; perturbed all at once, deep
    networks with attention run away.  So what the model answers at the end is what it would
    answer again, if each has run once; else None is returned.
    """
    settled: Counter[nn.Module] = Counter()
    statistics: dict[Any, tuple[Tensor, Tensor]] = {}
    answer: dict[str, Tensor] | None = None

    def settle(module: Any, inputs: tuple[Any, ...]) -> None:
        values = inputs[0] if inputs else None
        if isinstance(values, Tensor) and values.dim() > 1 and values.is_floating_point():
            rest = [0, *range(2, values.dim())]
            mean = values.mean(rest, keepdim=True)
            variance = (values - mean).square_().mean(rest)  # var takes ten times as long
            mean = mean.flatten()
            if mean.shape == module.running_mean.shape:
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance + 0.1 * variance.mean() + 1e-6)
                _perturb(module, generator)
                statistics[module] = module.running_mean.clone(), module.running_var.clone()
                settled[module] += 1

    normalising = [module for module in _hookable(model) if _has_statistics(module)]
    handles = [module.register_forward_pre_hook(settle) for module in normalising]
    try:
        if handles:
            with quiet_run(model):
                answer = answer_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    for module, (mean, variance) in statistics.items():  # a quiet run puts back what it wrote
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
    for module in normalising:
        if module not in settled:
            _perturb(module, generator)
    return answer if all(settled[module] == 1 for module in normalising) else None


def _perturb(module: Any, generator: torch.Generator) -> None:
    shape = module.running_mean.shape
    spread = module.running_var.sqrt()
    module.running_mean += 0.2 * spread * torch.randn(shape, generator=generator).to(spread)
    module.running_var *= (0.7 + 0.7 * torch.rand(shape, generator=generator)).to(spread)


def _sharpen(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], program: Program | None
) -> bool:
    """Multiply the weights of queries whose attention logits are too alike to matter.

    Whether any were: what is loud enough now stays so.
    """
    attentions = None if program is None else find_attentions(program)
    if attentions == {}:
        return False
    hearing = None if program is None else _hear(model, args, kwargs, program, attentions or {})
    if hearing is None:
        program = trace(model, args, kwargs, real=True).program
        attentions = find_attentions(program)
        hearing = _hear(model, args, kwargs, program, attentions) if attentions else None
    if hearing is None or not attentions:
        return False
    state, _ = state_of(model)
    sharpened = False
    for index, targets in attentions.items():
        spread = hearing.spread.get(index, 1.0)
        factor = min(max(1.2 / spread, 1.0), 1e3) if spread > 0 else 1.0
        for name, dim, positions in targets:
            if factor > 1 and state[name].is_floating_point():
                at = torch.as_tensor(positions, device=state[name].device)
                scaled = state[name].index_select(dim, at) * factor
                state[name].index_copy_(dim, at, scaled)
                sharpened = True
    return sharpened


def _hear(
    model: nn.Module, args: Any, kwargs: Any, program: Program, chosen: Mapping[int, Any]
) -> _Hearing | None:
    """How loud attentions are; None where the model runs other operators than the program."""
    hearing = _Hearing(set(chosen), [node.target for node in program.nodes])
    with quiet_run(model), plain_kernels(), adapted(model), hearing:
        model(*args, **kwargs)
    return hearing if hearing.same else None


class _Hearing(TorchDispatchMode):
    """Standard deviation of the attention logits of chosen operators, by their position."""

    def __init__(self, chosen: set[int], targets: Sequence[OpOverload]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spread: dict[int, float] = {}
        self._chosen = chosen
        self._targets = targets
        self._count = 0
        self._alike = True

    @property
    def same(self) -> bool:
        """Whether the operators were those of the program, to its end."""
        return self._alike and self._count == len(self._targets)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name not in PASSIVE:
            known = self._count < len(self._targets)
            self._alike = self._alike and known and self._targets[self._count] is func
            if self._alike and self._count in self._chosen:
                bound = bind(func, args, kwargs)
                logits = bound.get("self")
                if logits is None:
                    logits = _logits(bound["query"], bound["key"], bound.get("scale"))
                finite = logits[torch.isfinite(logits) & (logits > -1e4)]
                if finite.numel() > 1:
                    self.spread[self._count] = float(finite.double().std())
            self._count += 1
        return func(*args, **kwargs)


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """What a fused attention takes the softmax of, mask apart; heads may share a key."""
    if key.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
