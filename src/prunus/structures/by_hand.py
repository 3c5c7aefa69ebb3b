"""What a person names: heads of an attention, units of a group; masks that remove or keep them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from prunus.errors import PlanError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.structures.names import Attention, find_structures

Where = int | str


def with_units(graph: CouplingGraph, group: str, units: Iterable[int]) -> Mask:
    """The mask that keeps only these units of a group, and all of the others.

    Raises
    ------
    PlanError
        If there is no such group or unit, or none would be kept.
    """
    found = graph.group(group)
    chosen = _numbers(units, found.size, f"group {group}", "unit")
    if not chosen:
        raise PlanError(f"no unit of {group} would be kept", fix="name at least one unit to keep")
    kept = graph.all_kept
    kept[found.units] = False
    kept[found.units[chosen]] = True
    return kept


def _numbers(numbers: Iterable[int], size: int, where: str, what: str) -> list[int]:
    """The numbers, ascending; refused where one is out of range or there twice."""
    found = list(numbers)
    wrong = [n for n in found if not _is_number(n)] or [n for n in found if not 0 <= n < size]
    if wrong:
        raise PlanError(
            f"there is no {what} {wrong[0]!r}",
            where=where,
            why=f"it has {size}, with the numbers 0 to {size - 1}",
        )
    if len(set(found)) < len(found):
        raise PlanError(f"a {what} is named twice", where=where, fix=f"name each {what} once")
    return sorted(int(n) for n in found)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def without_heads(graph: CouplingGraph, heads: Mapping[Where, Collection[int]]) -> Mask:
    """The mask that removes these heads and no others.

    Parameters
    ----------
    heads
        Layer → numbers of its query heads, as the model now counts them.

    Raises
    ------
    PlanError
        If there is no such layer or head, if no head of a layer would be kept, or if heads can't be
        removed alone.
    """
    kept, anatomy = graph.all_kept, find_structures(graph)
    asked: dict[str, set[int]] = {}
    for where, numbers in heads.items():
        attention = anatomy.attention(where)
        size = len(attention.heads)
        chosen = _numbers(numbers, size, attention.module, "head")
        if len(chosen) == size:
            raise PlanError(
                "no head would be kept",
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
