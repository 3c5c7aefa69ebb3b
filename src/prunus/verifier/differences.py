"""What must not differ between the model and its pruned copy, found without running either.

A forward in eval mode notices neither a dropout's ``p`` nor a missing hook, an index map that
disagrees, a stale attribute, a lost tie, nor rows of a table that no token chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from prunus.graph.axis import Axis
from prunus.graph.expressions import other_paths, solve
from prunus.graph.plan_records import CLASS
from prunus.graph.program import stored
from prunus.surgeon.apply import differing_axes
from prunus.tracer.renormalised import find_weight_norms, norms_of
from prunus.tracer.trace import quiet_run
from prunus.tracer.wrappers import scripted
from prunus.verifier.case import Case

_STATED: tuple[tuple[Any, Callable[[Any], tuple[int, ...]]], ...] = (
    (nn.Linear, lambda m: (m.out_features, m.in_features)),
    (_ConvTransposeNd, lambda m: (m.in_channels, m.out_channels // m.groups)),
    (_ConvNd, lambda m: (m.out_channels, m.in_channels // m.groups)),
    (_NormBase, lambda m: (m.num_features,)),
    (nn.GroupNorm, lambda m: (m.num_channels,)),
    ((nn.LayerNorm, nn.RMSNorm), lambda m: tuple(m.normalized_shape)),
    (nn.Embedding, lambda m: (m.num_embeddings, m.embedding_dim)),
    (nn.PReLU, lambda m: (m.num_parameters,)),
)
"""What standard modules say of the first dims of their weight, or of their running mean."""


def other_positions(case: Case, *, elsewhere: bool = False) -> str:
    """Why the plan's index maps are no consistent choice of units; empty if they are.

    ``elsewhere``: the case's inputs are others than the plan's.  What they leave unused is then
    no contradiction: a recurrent weight reads only zeros in the first of one step.
    """
    implied = dict(case.graph.positions(case.kept))
    for axis in differing_axes(case.plan, implied):
        if not (elsewhere and axis not in implied and _is_unused(case, axis)):
            return f"the plan keeps other positions on {axis} than its couplings demand"
    return ""


def _is_unused(case: Case, axis: Axis) -> bool:
    """Whether nothing on these inputs labels an axis, and nothing pins it either."""
    label = case.graph.labels.get(axis)
    return (label is None or not label.any()) and not case.graph.why_pinned(axis)


def stale_attribute(case: Case) -> str:
    """A standard module of the pruned model that says another size than its tensors have."""
    modules = dict(case.pruned.named_modules())
    with _reading(case.original), _reading(case.pruned):
        for name, before in case.original.named_modules():
            said, shape = _stated(modules.get(name))
            said_before, shape_before = _stated(before)
            if said_before == shape_before and said != shape:
                return f"{name} says {said} of a tensor of shape {shape}: an attribute is stale"
    return ""


def other_count(case: Case) -> str:
    """Whether the cut removed as many parameters as the couplings say; tied ones come apart."""
    counts = [parameter_count(model) for model in (case.original, case.pruned)]
    removed = case.graph.cost("params") - case.graph.cost("params", case.kept)
    if counts[0] - counts[1] != removed:
        return f"the cut removed {counts[0] - counts[1]} parameters, its couplings say {removed}"
    return ""


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def _reading(model: nn.Module) -> AbstractContextManager[None]:
    """Reading a computed weight may change state, which is then put back."""
    return quiet_run(model) if any(map(is_parametrized, model.modules())) else nullcontext()


def _stated(module: nn.Module | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    stated = next((stated for kind, stated in _STATED if isinstance(module, kind)), None)
    if module is None or stated is None:
        return (), ()
    read = getattr if is_parametrized(module) else stored
    named = (read(module, name) for name in ("weight", "running_mean"))
    tensor = next((value for value in named if isinstance(value, Tensor)), None)
    if tensor is None:
        return (), ()
    said = stated(module)
    return said, tuple(tensor.shape[: len(said)])


_ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""How far a value may be off that was multiplied by a factor."""


def other_ties(case: Case) -> str:
    """A tensor of two names in one of the models only; empty if there is none."""
    for one, other in set(case.state[1].items()) ^ set(case.pruned_state[1].items()):
        return f"{one} and {other} are one tensor in one of the models only"
    return ""


def other_tensors(case: Case) -> str:
    """What the surgeon did to a tensor beside slicing it; empty if nothing."""
    before, after = case.state[0], case.pruned_state[0]
    forgotten, kept = _forgotten(case), _kept(case)
    factors = _factors(case, before, after, kept)
    compared = {name: tensor for name, tensor in before.items() if name not in forgotten}
    for name, tensor in compared.items():
        if name not in after:
            return f"the pruned model has no {name}"
        expected = _sliced(tensor, kept.get(name, {}))
        reason = _other_kind(case, name, tensor, after[name]) or _other_values(
            case, name, expected, after[name], factors.get(name)
        )
        if reason:
            return f"{name} {reason}"
    added = next((name for name in after if name not in {*before, *forgotten}), "")
    return added and f"the pruned model has a {added}, the original has none"


def _forgotten(case: Case) -> set[str]:
    """Tensors that a forward makes anew: caches, and weights computed from others."""
    traced = case.plan.traced
    names = set() if traced is None else {n.replace(":", ".").lstrip(".") for n in traced.caches}
    for path, module in case.original.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and module._forward_pre_hooks:
                names.add(f"{path}.{name}".lstrip("."))
    return names


def _kept(case: Case) -> dict[str, dict[int, Sequence[int]]]:
    """The positions that the plan keeps, by tensor and dim."""
    found: dict[str, dict[int, Sequence[int]]] = {}
    for axis, stay in case.plan.keep.items():
        found.setdefault(axis.tensor, {})[axis.dim] = stay
    return found


def _other_kind(case: Case, name: str, before: Tensor, after: Tensor) -> str:
    kinds = (("type", before.dtype, after.dtype), ("device", before.device, after.device))
    for what, had, has in kinds:
        if had != has:
            return f"has the {what} {has}, and had {had}"
    if before.requires_grad != after.requires_grad and isinstance(before, nn.Parameter):
        return f"says requires_grad={after.requires_grad}, and said {before.requires_grad}"
    other = type(before) is not type(after)
    # Copies of ScriptModules hold plain tensors.
    if other and name.rpartition(".")[0] not in scripted(case.original):
        return f"is a {type(after).__name__}, and was a {type(before).__name__}"
    return ""


def _sliced(tensor: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    """The kept positions of a tensor, which may be one without values to slice."""
    sliced = tensor.detach()
    for dim, stay in kept.items() if _has_values(tensor) else ():
        index = torch.as_tensor(np.asarray(stay, dtype=np.int64), device=tensor.device)
        sliced = sliced.index_select(dim, index)
    return sliced


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _other_values(
    case: Case, name: str, expected: Tensor, after: Tensor, factors: Tensor | None
) -> str:
    if not _has_values(expected):
        return ""
    if expected.shape != after.shape:
        return f"has the shape {tuple(after.shape)}, not {tuple(expected.shape)}"
    if _order(case.state[0][name]) != _order(after):
        return "lies in memory in another order of its dims"
    if name in case.replay.writes:
        return ""  # statistics of an observer, say, which the runs since have changed
    return "" if _equal(expected, after.detach(), factors) else "has other values than it had"


def _equal(expected: Tensor, after: Tensor, factors: Tensor | None) -> bool:
    if factors is None:
        if torch.equal(expected, after):
            return True
        return bool(((expected == after) | ((expected != expected) & (after != after))).all())
    scaled = expected.double() * factors
    limit = _ROUNDED.get(after.dtype, 1e-2)
    return bool(((after.double() - scaled).abs() <= limit * scaled.abs() + 1e-30).all())


def _factors(
    case: Case,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Sequence[int]]],
) -> dict[str, Tensor]:
    """What kept positions were multiplied by, by the plan or for a weight norm."""
    found = dict(_norm_factors(case, before, after, kept))
    for scaling in case.plan.scalings:
        name, dim = scaling.tensor, scaling.dim
        factors = torch.ones(case.plan.shapes[name][dim], dtype=torch.float64)
        factors[list(scaling.positions)] = scaling.factor
        shape = [-1 if own == dim else 1 for own in range(before[name].dim())]
        own = {dim: kept[name][dim]} if dim in kept.get(name, {}) else {}
        scaled = _sliced(factors.reshape(shape), own).to(before[name].device)
        found[name] = found[name] * scaled if name in found else scaled
    return found


def _norm_factors(
    case: Case,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Sequence[int]]],
) -> Iterator[tuple[str, Tensor]]:
    """The magnitude of a weight norm makes up for what its direction loses."""
    for norm in find_weight_norms(case.original, dict(before)):
        name, direction = norm.magnitude, norm.direction
        if (
            not {direction, name} <= after.keys()
            or before[direction].shape == after[direction].shape
        ):
            continue
        whole, own = norms_of(before[direction], norm.dim), kept.get(direction, {})
        whole = _sliced(whole, {dim: stay for dim, stay in own.items() if dim == norm.dim})
        ratio = norms_of(after[direction], norm.dim) / whole
        yield name, ratio.nan_to_num(1.0, 1.0).reshape(after[name].shape)


def _order(tensor: Tensor) -> str:
    """The memory format, as far as it has a name."""
    for name, dims in (("channels_last", 4), ("channels_last_3d", 5)):
        plain = tensor.dim() != dims or tensor.is_contiguous()
        if not plain and tensor.is_contiguous(memory_format=getattr(torch, name)):
            return name
    return ""


_HOOKS = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules")
)
_PLAIN = (bool, int, float, str, type(None))
_LOST = object()


def other_attributes(case: Case) -> str:
    """A module, attribute or hook that differs and is in no edit of the plan; empty if none."""
    before = dict(case.original.named_modules(remove_duplicate=False))
    after = dict(case.pruned.named_modules(remove_duplicate=False))
    for path in (*before, *after):
        if path not in before or path not in after:
            return f"{path}: one of the models has no such module"
    edited, shared = _edited(case, before, after)
    pruned: dict[int, nn.Module] = {}
    for path, module in before.items():
        if pruned.setdefault(id(module), after[path]) is not after[path]:
            return f"{path}: it was one module under several names, and is so no more"
        reason = _module_differs(module, after[path], edited.get(id(module), set()), shared)
        if reason:
            return f"{path or 'the model'}: {reason}"
    return ""


def _edited(
    case: Case, before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]
) -> tuple[dict[int, set[str]], dict[int, Any]]:
    """The attributes that the plan edits, by module, and what became of lists in them, by id."""
    edited: dict[int, set[str]] = {}  # by module: one may have several paths
    shared: dict[int, Any] = {}
    for edit in case.plan.edits:
        if edit.module not in before:
            continue
        module, name = before[edit.module], _root(edit.attribute)
        edited.setdefault(id(module), set()).add(edit.attribute)
        if name in vars(module):
            _pair_lists(vars(module)[name], vars(after[edit.module]).get(name), shared)
    return edited, shared


def _root(edit: str) -> str:
    """The attribute of the module that an edit is in.

    >>> _root("config[1].heads")
    'config'
    """
    return edit.partition(".")[0].partition("[")[0]


def _pair_lists(before: Any, after: Any, found: dict[int, Any]) -> None:
    """What became of lists in an edited attribute, by id: other modules may hold the same ones."""
    if isinstance(before, (list, tuple)) and type(before) is type(after):
        if isinstance(before, list):
            found[id(before)] = after
        for one, other in zip(before, after, strict=False):
            _pair_lists(one, other, found)


def _module_differs(
    before: nn.Module, after: nn.Module, edits: set[str], shared: Mapping[int, Any]
) -> str:
    if isinstance(before, torch.jit.ScriptModule):
        return ""  # copies are of another class, and nothing edits its attributes
    if type(before) is not type(after) and CLASS not in edits:
        return f"it is a {type(after).__name__}, and was a {type(before).__name__}"
    had, has = vars(before), vars(after)
    if set(had["_non_persistent_buffers_set"]) != set(has["_non_persistent_buffers_set"]):
        return "other buffers are left out of its state_dict"
    for name in _HOOKS:
        if list(map(_kind, had[name].values())) != list(map(_kind, has[name].values())):
            return f"its {name} are others than they were"
    ignored = {*map(_root, edits), *_HOOKS}
    return _other_attribute(
        {n: v for n, v in had.items() if n not in ignored and _is_plain(v)}, has, shared
    )


def _other_attribute(
    had: Mapping[str, Any], has: Mapping[str, Any], shared: Mapping[int, Any]
) -> str:
    for name, value in had.items():
        found = has.get(name, _LOST)
        if found is _LOST:
            return f"it has lost {name}, which was {value!r}"
        if id(value) in shared and found is shared[id(value)]:
            continue  # the very list that was edited
        if not _same(value, found):
            return f"{name} is {found!r}, and was {value!r}; the plan does not edit it"
    return ""


def _kind(hook: Any) -> Any:
    return getattr(hook, "__qualname__", type(hook))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def other_path(case: Case) -> str:
    """A comparison that comes out otherwise once the units are gone; empty if none does.

    It need not show in the outputs: what it decides may wait for other inputs.
    """
    graph = case.graph
    solution = solve(graph.equations, graph.attributes, case.kept)
    for index in other_paths(graph.conditions, solution, case.kept):
        condition = graph.conditions[index]
        where = " in ".join(filter(None, (condition.source, condition.module)))
        return f"{where}: the code compares sizes, and comes to another answer after the cut"
    return ""
