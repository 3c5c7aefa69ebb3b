"""What an engine made of a model, judged without its own word.

The verdict rests on the tensors alone: which positions stayed is read off the values, and the
pruned model is compared with the original in which the others are silenced.
"""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import prunus
from prunus.graph.axis import Axis

Status = Literal["ok", "broken forward", "shape changed", "failed", "timeout", "too little removed"]
Verdict = Literal["exact", "inexact", "not judged"]
Keep = dict[Axis, tuple[int, ...]]

LIMIT = 60
"""Seconds of processor time that an engine may take, so that a busy machine changes no result."""

EXACT = 1e-4
"""Largest relative error of the outputs that still counts as exact."""

DIFFERENT = 1e-3
"""A difference that rounding does not explain; a removal has to move the outputs by as much."""

ENOUGH = 0.75
"""Largest share of the parameters that may be left."""


@dataclass(frozen=True)
class Outcome:
    """What an engine did to one model.

    ``moved`` is how far the removal moves the outputs of the original, ``rel_err`` how far the
    pruned model is from the original with the same removed; ``seconds`` are the engine's own.
    """

    status: Status
    verdict: Verdict = "not judged"
    moved: float = math.nan
    rel_err: float = math.nan
    param_ratio: float = math.nan
    seconds: float = math.nan
    reason: str = ""


def judge(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    prune: Callable[[nn.Module], nn.Module],
) -> Outcome:
    """Let the model listen, in place; have a copy of it pruned, run that, and compare."""
    warnings.simplefilter("ignore")
    model.eval()
    # What Prunus can't trace, others may prune.
    with contextlib.suppress(prunus.PrunusError, RuntimeError):
        prunus.verifier.randomize(model, tuple(args), kwargs)
    before = _run(model, args, kwargs)
    twin = copy.deepcopy(model)
    started = time.perf_counter()
    try:
        with limited(LIMIT):
            pruned = prune(twin)
    except Exception as error:  # whatever an engine raises is its answer
        return Outcome("failed", seconds=time.perf_counter() - started, reason=blame(error))
    except OutOfTime:
        return Outcome("timeout", seconds=LIMIT, reason=f"stopped after {LIMIT} processor seconds")
    seconds = time.perf_counter() - started
    ratio = count_parameters(pruned) / count_parameters(model)
    status: Status = "ok" if ratio <= ENOUGH else "too little removed"
    found = Outcome(status, param_ratio=ratio, seconds=seconds)
    try:
        after = _run(pruned.eval(), args, kwargs)
    except Exception as error:  # as may the forward that it leaves behind
        return replace(found, status="broken forward", reason=blame(error))
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        wrong = [f"{a} became {b}" for a, b in zip(*shapes, strict=False) if a != b]
        return replace(found, status="shape changed", reason="; ".join(wrong)[:200])
    return _compare(found, model, pruned, args, kwargs)


class OutOfTime(BaseException):
    """No ``Exception``, so that no engine takes it for one of its own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Interrupt the main thread once the process has used that much of a processor."""

    def stop(_signal: int, _frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, should the first have been swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _compare(
    found: Outcome, model: nn.Module, pruned: nn.Module, args: Any, kwargs: Any
) -> Outcome:
    """Add the verdict: in float32, whatever the model is in."""
    keep: Keep = {}
    own, cut = _state(model), _state(pruned)
    for name, tensor in own.items():
        if name not in cut:
            return replace(found, reason=f"there is no {name} any more")
        indices = recover(tensor, cut[name])
        if indices is None:
            return replace(found, reason=f"{name} has other values, not fewer")
        keep |= {Axis(name, dim): index for dim, index in indices.items()}
    if not keep:
        return replace(found, reason="nothing was removed")
    if any(t.dtype in (torch.bfloat16, torch.float16) for t in own.values()):
        model, pruned = copy.deepcopy(model).float(), copy.deepcopy(pruned).float()
        args, kwargs = _as_float(tuple(args)), _as_float(dict(kwargs))
    before, after = _run(model, args, kwargs), _run(pruned, args, kwargs)
    silenced = _run(silence(model, pruned, keep), args, kwargs)
    try:
        masked, fault = _masked(model, keep, args, kwargs)
    except (prunus.PrunusError, RuntimeError) as error:
        masked, fault = None, f"no reference: {blame(error)}"
    if masked is not None:
        return _verdict(found, before, masked, after, "")
    plain = relative_error(silenced, after)
    if plain <= EXACT:
        return _verdict(found, before, silenced, after, fault if "tied" in fault else "")
    if plain > DIFFERENT and not fault.startswith("no reference"):
        return _verdict(found, before, silenced, after, fault)
    return replace(found, moved=relative_error(before, silenced), rel_err=plain, reason=fault)


def _verdict(
    found: Outcome, before: list[Tensor], reference: list[Tensor], after: list[Tensor], reason: str
) -> Outcome:
    moved, error = relative_error(before, reference), relative_error(reference, after)
    verdict: Verdict = "exact" if error <= EXACT else "inexact"
    if verdict == "exact" and not moved > DIFFERENT:
        verdict, reason = "not judged", "the removal moves no output"
    return replace(found, verdict=verdict, moved=moved, rel_err=error, reason=reason)


def _masked(
    model: nn.Module, keep: Keep, args: Any, kwargs: Any
) -> tuple[list[Tensor] | None, str]:
    """Outputs of the masked original; or none, and what is no consistent choice."""
    graph = prunus.trace(model, tuple(args), kwargs)
    first: Keep = {}
    for axis, stay in keep.items():
        own = Axis(graph.aliases.get(axis.tensor, axis.tensor), axis.dim)
        if first.setdefault(own, stay) != stay:
            return None, f"tied weights came apart: {axis}"
    apart = [a for a in graph.aliases.items() for d in range(len(graph.shapes[a[1]]))
             if (Axis(a[0], d) in keep) != (Axis(a[1], d) in keep)]  # fmt: skip
    if apart:
        return None, f"tied weights came apart: {apart[0][0]} and {apart[0][1]}"
    kept = graph.mask_from_positions({a: np.asarray(stay) for a, stay in first.items()})
    implied = {axis: tuple(stay.tolist()) for axis, stay in graph.positions(kept)}
    wrong = [axis for axis in (*first, *implied) if first.get(axis) != implied.get(axis)]
    if wrong:
        return None, f"cut across couplings: {wrong[0]}"
    shapes = {n: tuple(s) for n, s in graph.shapes.items() if n not in graph.aliases}
    plan = prunus.Plan(keep=first, shapes=shapes, origin={"traced": graph.traced})
    with prunus.mask(plan, model):
        return _run(model, args, kwargs), ""


def silence(model: nn.Module, pruned: nn.Module, keep: Keep) -> nn.Module:
    """A copy in which what computes a removed position and what reads it have zeros there.

    Norms see what is kept alone.  This is plain PyTorch and knows nothing of couplings.
    """
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules(remove_duplicate=False))
    _untie(modules.values())
    after = dict(pruned.named_modules(remove_duplicate=False))
    state = _state(twin)
    with torch.no_grad():
        for axis, stay in keep.items():
            name, _, short = axis.tensor.rpartition(".")
            owner, tensor = modules.get(name), state[axis.tensor]
            if owner is None:
                continue
            if short == "weight" and "Norm" in type(owner).__name__ and tensor.dim() == 1:
                _narrow(owner, after.get(name), stay)
            elif _multiplies(owner):
                gone = np.setdiff1d(np.arange(tensor.shape[axis.dim]), stay)
                tensor.index_fill_(axis.dim, torch.as_tensor(gone), 0)
    return twin


def _untie(modules: Iterable[nn.Module]) -> None:
    """Give every module weights of its own, since an engine may have cut one of two alone."""
    seen: set[int] = set()
    for module in dict.fromkeys(modules):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _narrow(norm: Any, pruned: Any, stay: Sequence[int]) -> None:
    """Let a norm see the channels that stay; a group norm in the groups that they were in."""
    kept = torch.as_tensor(stay)

    def over_channels(x: Tensor) -> Tensor:
        dim = 1 if "2d" in type(norm).__name__ else -1
        return torch.zeros_like(x).index_copy(dim, kept, pruned(x.index_select(dim, kept)))

    def over_groups(x: Tensor) -> Tensor:
        there = torch.zeros(x.shape[1]).index_fill(0, kept, 1).reshape(norm.num_groups, -1)
        blocks = x.reshape(len(x), norm.num_groups, there.shape[1], -1)
        there = there[..., None]
        count = (there.sum(1, keepdim=True) * blocks.shape[-1]).clamp(min=1)
        mean = (blocks * there).sum((2, 3), keepdim=True) / count
        centred = (blocks - mean) * there
        variance = centred.square().sum((2, 3), keepdim=True) / count
        y = (centred / (variance + norm.eps).sqrt()).reshape(x.shape)
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        out: Tensor = (y * norm.weight.view(shape) + norm.bias.view(shape)) * there.view(shape)
        return out

    if isinstance(norm, nn.GroupNorm):
        norm.forward = over_groups
    elif pruned is not None and (
        "LayerNorm" in type(norm).__name__ or "RMS" in type(norm).__name__
    ):
        norm.forward = over_channels


def _multiplies(module: nn.Module) -> bool:
    """Whether zeros in a module's weights silence something; embeddings are inputs, norms see."""
    kinds = (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def recover(original: Tensor, pruned: Tensor) -> dict[int, tuple[int, ...]] | None:
    """Which positions of each dim stayed, read off the values; none where that explains nothing.

    >>> x = torch.arange(12.0).reshape(3, 4)
    >>> recover(x, x[[0, 2]][:, 1:])
    {0: (0, 2), 1: (1, 2, 3)}
    """
    if original.shape == pruned.shape:
        return {} if torch.equal(original, pruned) else None
    if original.dim() != pruned.dim() or not pruned.numel():
        return None
    whole, part = _array(original), _array(pruned)
    values, first, counts = np.unique(whole, return_index=True, return_counts=True)
    at = np.searchsorted(values, part.ravel()).clip(max=len(values) - 1)
    hits = np.flatnonzero((values[at] == part.ravel()) & (counts[at] == 1))
    there = np.unravel_index(first[at[hits]], whole.shape)
    here = np.unravel_index(hits, part.shape)
    indices = [np.arange(size) for size in whole.shape]
    for dim, size in enumerate(part.shape):
        if size != whole.shape[dim]:
            index = np.full(size, -1)
            index[here[dim]] = there[dim]
            if (index < 0).any() or (np.diff(index) <= 0).any():
                return None
            indices[dim] = index
    if not np.array_equal(whole[np.ix_(*indices)], part):
        return None
    cut = [dim for dim, size in enumerate(part.shape) if size != whole.shape[dim]]
    return {dim: tuple(indices[dim].tolist()) for dim in cut}


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest ‖a − b‖∞ / ‖a‖∞ over floating-point outputs; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.is_floating_point() and a.numel():
            finite = torch.isfinite(a)
            if not torch.equal(finite, torch.isfinite(b)):
                return math.inf
            a, b = a[finite].double(), b[finite].double()
            if a.numel():
                scale = float(a.abs().max()) or 1.0
                worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def blame(error: BaseException) -> str:
    """One line: the type, the message, and the line that raised it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    text = " ".join(f"{type(error).__name__}: {error}".split())[:240]
    if last is None:
        return text
    return f"{text} [{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}]"


def _run(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors_of(model(*args, **kwargs)) if t.is_floating_point()]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an output; caches and other objects of a model's own are none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_of(item)]
    return []


def _as_float(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_float(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_as_float(item) for item in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
