"""Removing what a person names: heads of an attention, units of a group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.api import Shrunk, inputs_of, unproven
from prunus.errors import PlanError, checks_options
from prunus.graph.axis import Mask
from prunus.graph.constraints import find_violation
from prunus.graph.coupling import CouplingGraph
from prunus.planner.width_planning import plan_of_mask
from prunus.structures import Anatomy, find_structures
from prunus.structures.names import Attention
from prunus.surgeon import apply
from prunus.surgeon.depth import refuse_quantized
from prunus.surgeon.snapshot import all_or_nothing
from prunus.tracer.trace import trace
from prunus.verifier.other_ways import follow_other_ways
from prunus.verifier.verify import verify_traced

Where = int | str


@checks_options
@all_or_nothing
def prune_heads(
    model: nn.Module,
    heads: Mapping[Where, Collection[int]],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verified: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Shrunk:
    """Remove attention heads by their numbers; the model changes in place.

    Parameters
    ----------
    model
        Any model whose attention is softmax(q kᵀ) v, fused or written out.
    heads
        Layer → numbers of its query heads, as the model now counts them.  A layer is given by its
        number, or by its path or that of its attention where several stacks have numbers.
    args, kwargs
        Example inputs for the forward; a model of transformers needs none.
    verified
        Prove first, on a copy, that the cut model computes the masked original.
    optimizer
        Its state is cut along, as by :func:`prunus.apply`.

    Raises
    ------
    PlanError
        If there is no such layer or head, if nothing would stay of a layer, or if heads can't go
        alone: query heads share keys and values with others of their KV group, and layers that
        share a position bias share their heads.
    VerifyError
        If the proof fails; the model was not touched.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> shrunk = prune_heads(model, {0: [1, 2]}, torch.randn(1, 3, 8))
    >>> shrunk.certificate.verdict, model.layers[0].self_attn.num_heads
    ('exact', 2)
    """
    refuse_quantized(model)
    args, kwargs = inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs)
    kept = _without_heads(graph, find_structures(graph), heads)
    return _cut(model, graph, kept, args, kwargs, verified, optimizer, seed)


@checks_options
@all_or_nothing
def keep(
    model: nn.Module,
    group: str,
    units: Collection[int],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verified: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Shrunk:
    """Keep only the given units of a group; the model changes in place.

    Parameters
    ----------
    group
        Its name, as ``prunus inspect`` lists it.
    units
        Numbers of the units that stay, from 0.
    args, kwargs, verified, optimizer
        As for :func:`prune_heads`.

    Raises
    ------
    PlanError
        If there is no such group or unit, if none would stay, or if a constraint forbids it.
    VerifyError
        If the proof fails; the model was not touched.
    """
    refuse_quantized(model)
    args, kwargs = inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs)
    found = graph.group(group)
    chosen = _numbers(units, found.size, f"group {group}", "unit")
    if not chosen:
        raise PlanError(f"no unit of {group} would stay", fix="name at least one unit to keep")
    kept = graph.all_kept
    kept[found.units] = False
    kept[found.units[chosen]] = True
    return _cut(model, graph, kept, args, kwargs, verified, optimizer, seed)


def _numbers(numbers: Iterable[int], size: int, where: str, what: str) -> list[int]:
    """The numbers, ascending; refused where one is out of range or there twice."""
    found = list(numbers)
    wrong = [n for n in found if isinstance(n, bool) or not isinstance(n, (int, np.integer))]
    beyond = [n for n in found if n not in wrong and not 0 <= n < size]
    if wrong or beyond:
        raise PlanError(
            f"there is no {what} {(wrong or beyond)[0]!r}",
            where=where,
            why=f"it has {size}, with the numbers 0 to {size - 1}",
        )
    if len(set(found)) < len(found):
        raise PlanError(f"a {what} is named twice", where=where, fix=f"name each {what} once")
    return sorted(int(n) for n in found)


def _without_heads(
    graph: CouplingGraph, anatomy: Anatomy, heads: Mapping[Where, Collection[int]]
) -> Mask:
    """The mask that removes these heads and no others."""
    kept = graph.all_kept
    asked: dict[str, set[int]] = {}
    for where, numbers in heads.items():
        attention = anatomy.attention(where)
        size = len(attention.heads)
        chosen = _numbers(numbers, size, attention.module, "head")
        if len(chosen) == size:
            raise PlanError(
                "no head would stay",
                where=attention.module,
                why=f"all of its {size} heads were named" if size else "its heads can't be pruned",
                fix="leave one, or drop the layer: prunus.drop_layers",
            )
        asked.setdefault(attention.module, set()).update(chosen)
        _remove(attention, chosen, kept)
    for attention in anatomy.attentions:
        gone = np.flatnonzero(~kept[attention.heads].all(axis=1))
        more = sorted(set(gone.tolist()) - asked.get(attention.module, set()))
        if more:
            raise PlanError(
                f"head {more[0]} would go as well",
                where=attention.module,
                why="layers share something that speaks of heads, a position bias for example",
                fix="name the same heads in all of these layers",
            )
    return kept


def _remove(attention: Attention, chosen: list[int], kept: Mask) -> None:
    """Mark the units that only these heads have."""
    label = attention.heads
    stay = np.setdiff1d(np.arange(len(label)), chosen)
    free = np.setdiff1d(label[chosen], label[stay])
    kept[free[free > 0]] = False
    left = [n for n in chosen if kept[label[n]].all()]
    if left:
        raise PlanError(
            f"head {left[0]} can't go alone",
            where=attention.module,
            why=_why_together(attention),
            fix="name all heads of a KV group, or the same place in every KV group"
            if attention.kv_heads < len(label)
            else "",
        )


def _why_together(attention: Attention) -> str:
    count, shared = len(attention.heads), attention.kv_heads
    if shared < count:
        return (
            f"its {count} query heads share {shared} keys and values: every KV group has to have "
            "equally many"
        )
    pinned: NDArray[np.bool_] = (attention.heads == 0).all(axis=1)
    return "it is pinned (see `prunus inspect --why-pinned`)" if pinned.any() else "heads are tied"


def _cut(
    model: nn.Module,
    graph: CouplingGraph,
    kept: Mask,
    args: Any,
    kwargs: Any,
    verified: bool,
    optimizer: torch.optim.Optimizer | None,
    seed: int,
) -> Shrunk:
    broken = find_violation(graph.constraints, kept)
    if broken:
        raise PlanError("these units can't be removed by themselves", why=broken)
    plan = plan_of_mask(graph, model, kept, {"chosen": "by hand", "traced": graph.traced})
    plan = follow_other_ways(plan, graph, model, kept)
    certificate = None
    if verified and plan.keep:
        certificate = verify_traced(plan, model, args, kwargs, seed=seed, graph=graph)
        if certificate.verdict == "inexact":
            raise unproven(certificate)
    apply(plan, model, optimizer=optimizer)
    return Shrunk(model, graph, plan, certificate)
