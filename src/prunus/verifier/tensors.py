"""Every tensor of the pruned model is the original's at the kept positions, bit by bit.

This needs no input, so it also sees what no input shows: rows of a table that no token chooses, a
kernel that a small image reads in the middle only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunus.graph.axis import Axis
from prunus.graph.program import state_of
from prunus.tracer.refusals import scripted
from prunus.tracer.weight_norm import find_weight_norms, norms_of
from prunus.verifier.case import Case

_ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""How far a value may be off that was multiplied by a factor."""


def other_tensors(case: Case) -> str:
    """What the surgeon did to a tensor beside slicing it; empty if nothing."""
    (before, ties), (after, tied) = state_of(case.original), state_of(case.pruned)
    if ties != tied:
        changed = next(iter(set(ties.items()) ^ set(tied.items())))
        return f"{changed[0]} and {changed[1]} are one tensor in one of the models only"
    forgotten, factors = _forgotten(case), _made_up(case, before, after)
    kept = _kept(case)
    for name, tensor in before.items():
        if name in forgotten:
            continue
        if name not in after:
            return f"the pruned model has no {name}"
        reason = _differs(case, name, tensor, after[name], kept.get(name, {}), factors.get(name))
        if reason:
            return f"{name} {reason}"
    added = [name for name in after if name not in before and name not in forgotten]
    return f"the pruned model has a {added[0]}, the original has none" if added else ""


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


def _differs(
    case: Case,
    name: str,
    before: Tensor,
    after: Tensor,
    kept: Mapping[int, Sequence[int]],
    made_up: Tensor | None,
) -> str:
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
    if before.layout != torch.strided or before.is_meta or before.is_quantized:
        return ""
    expected = before.detach()
    for dim, stay in kept.items():
        index = torch.as_tensor(np.asarray(stay, dtype=np.int64), device=before.device)
        expected = expected.index_select(dim, index)
    if expected.shape != after.shape:
        return f"has the shape {tuple(after.shape)}, not {tuple(expected.shape)}"
    if _order(before) != _order(after):
        return "lies in memory in another order of its dims"
    if name in case.replay.writes:
        return ""  # statistics of an observer, say, which the runs since have changed
    factors = _factors(case, name, expected, kept, made_up)
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
    name: str,
    expected: Tensor,
    kept: Mapping[int, Sequence[int]],
    made_up: Tensor | None,
) -> Tensor | None:
    """The factors on the kept positions, of the plan or a weight norm; None without any."""
    found = made_up
    for scaling in case.plan.scalings:
        if scaling.tensor != name:
            continue
        size = case.plan.shapes[name][scaling.dim]
        own = torch.ones(size, dtype=torch.float64)
        own[list(scaling.positions)] = scaling.factor
        own = own[list(kept.get(scaling.dim, range(size)))].to(expected.device)
        shape = [-1 if dim == scaling.dim else 1 for dim in range(expected.dim())]
        found = own.reshape(shape) if found is None else found * own.reshape(shape)
    return found


def _made_up(
    case: Case, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What magnitudes of weight norms are multiplied by, whose directions became shorter."""
    found: dict[str, Tensor] = {}
    for norm in find_weight_norms(case.original, dict(before)):
        name = norm.magnitude
        if norm.direction not in after or name not in after:
            continue
        if before[norm.direction].shape != after[norm.direction].shape:
            whole = norms_of(before[norm.direction], norm.dim)
            for axis, stay in case.plan.keep.items():
                if axis == Axis(norm.direction, norm.dim):
                    index = torch.as_tensor(np.asarray(stay, dtype=np.int64), device=whole.device)
                    whole = whole.index_select(norm.dim, index)
            ratio = norms_of(after[norm.direction], norm.dim) / whole
            found[name] = ratio.nan_to_num(1.0, 1.0).reshape(after[name].shape)
    return found


def _order(tensor: Tensor) -> str:
    """The memory format, as far as it has a name."""
    for name, dims in (("channels_last", 4), ("channels_last_3d", 5)):
        plain = tensor.dim() != dims or tensor.is_contiguous()
        if not plain and tensor.is_contiguous(memory_format=getattr(torch, name)):
            return name
    return ""
