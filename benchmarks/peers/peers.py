"""The other engines, driven by their documented interfaces, and judged without their own word.

Every driver takes a model and its inputs, asks one engine for about half of it, and says what came
of it.  The verdict rests on the tensors alone: which positions stayed is read off the values, and
the pruned model is compared with the original in which the others are silenced.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
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
            budget = ParameterBudget(max_params=int(_count(m) * share))
            return pruner.prune(candidates, budget=budget, strategy=strategy)[0]
        except PlanningError:  # it asks for more than can be reached; we count less as success
            budget = ParameterBudget(max_params=int(_count(m) * ENOUGH))
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
            output_transform=lambda output: [t for t in _tensors(output) if t.grad_fn is not None],
        )
        pruner.step()
        for layer, hint in heads.items():
            hint.update(layer, pruner.num_heads.get(layer, hint.count))
        return twin

    return judge(model, args, kwargs, prune)


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
        outputs = [t for t in _tensors(twin(*args, **kwargs)) if t.grad_fn is not None]
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
    ratio = _count(pruned) / _count(model)
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
        return [t.clone() for t in _tensors(model(*args, **kwargs)) if t.is_floating_point()]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an output; caches and other objects of a model's own are none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
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


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
