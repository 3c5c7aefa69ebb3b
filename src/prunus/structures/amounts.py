"""How many units of each group come to what is asked of a structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prunus.errors import PlanError
from prunus.graph.amounts import LAYERS, REMOVABLE, Remove, read_amount
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import AtLeast
from prunus.graph.plan_records import Renaming
from prunus.structures.names import Anatomy, Structure, find_structures


@dataclass(frozen=True)
class Asked:
    """How many units a group is asked to lose; a share of them is not rounded, a count is exact."""

    units: float
    counted: bool


def units_asked(
    graph: CouplingGraph, remove: Remove, dropped: Iterable[str] = ()
) -> dict[str, dict[str, Asked]]:
    """For every structure, except layers, what is asked of its groups, by the group's name.

    Parameters
    ----------
    dropped
        Blocks that the graph is without; layers are called as in the model with them.

    Raises
    ------
    PlanError
        If the model lacks a structure or a layer, or a layer has too few units.
    """
    anatomy, names = find_structures(graph), Renaming(dropped)
    found = {}
    for structure, asked in remove.items():
        if structure == LAYERS:
            continue
        parts = parts_of(anatomy, structure)
        if not parts:
            raise _lacking(graph, anatomy, structure)
        chosen = dict.fromkeys(parts, asked)
        if isinstance(asked, Mapping):
            chosen = {
                part: amount
                for layer, amount in asked.items()
                for part in _parts_in(structure, parts, layer, names)
            }
        found[structure] = {
            part.group: _units(graph, part, structure, read_amount(amount))
            for part, amount in chosen.items()
        }
    return found


def parts_of(anatomy: Anatomy, structure: str) -> tuple[Structure, ...]:
    """The groups of which a structure consists."""
    return anatomy.of(*REMOVABLE[structure].kinds)


def _parts_in(
    structure: str, parts: Iterable[Structure], layer: int | str, names: Renaming
) -> list[Structure]:
    """The parts in one layer, by its path, or by a number that layers of one stack only have."""
    paths = {part: names.before(part.layer) if part.layer else "" for part in parts}
    found = {part: path for part, path in paths.items() if _is_called(path, layer)}
    if len(set(found.values())) == 1:
        return list(found)
    known = dict.fromkeys(path or "what several layers share" for path in paths.values())
    raise PlanError(
        f"{len(set(found.values())) or 'no'} layers with {structure} are called {layer!r}",
        where=f"remove[{structure!r}]",
        why=f"its {structure} are in {', '.join(known)}",
        fix="name a layer by its path; what several layers share takes one amount, no mapping",
    )


def _is_called(path: str, layer: int | str) -> bool:
    return bool(path) and (path == layer or path.rpartition(".")[2] == str(layer))


def _units(
    graph: CouplingGraph, part: Structure, structure: str, amount: float | int | None
) -> Asked:
    """What an amount comes to, refused where too little would be kept."""
    assert amount is not None  # checked at the edge
    counted, each = isinstance(amount, int), part.each
    units = amount / each if counted else amount * part.size
    least, why = _kept_at_least(graph, part)
    where, sharing = part.layer or part.group, _SHARING.get(structure, "")
    if units > part.size - least and (counted or (least > 1 and units >= part.size - least + 0.5)):
        raise PlanError(
            f"{units * each:g} {structure} can't be removed of {part.size * each}",
            where=where,
            why=why
            or (
                f"one of each of the {each} {sharing} has to be kept"
                if each > 1
                else "one has to be kept"
            ),
            fix=f"remove at most {(part.size - least) * each}; remove={{'layers': 1}} drops layers",
        )
    if counted and amount % each:
        raise PlanError(
            f"{amount} {structure} can't be removed of {part.size * each}",
            where=where,
            why=f"each of the {each} {sharing} has to lose equally many",
            fix=f"give a multiple of {each}"
            + (", or remove whole 'kv_groups'" if structure == "heads" else ""),
        )
    return Asked(units, counted)


_SHARING = {"heads": "KV groups", "experts": "routing groups"}


def _kept_at_least(graph: CouplingGraph, part: Structure) -> tuple[int, str]:
    """How many units are kept at least, and why that is more than one."""
    units, found = graph.group(part.group).units, (1, "")
    for one in graph.constraints:
        if isinstance(one, AtLeast) and one.least > 1 and np.isin(one.label, units).any():
            found = max(found, (min(one.least, part.size), f"{one.reason} takes {one.least}"))
    return found


def _lacking(graph: CouplingGraph, anatomy: Anatomy, structure: str) -> PlanError:
    there = [name for name in REMOVABLE if parts_of(anatomy, name)]
    there += [LAYERS] if graph.blocks else []
    return PlanError(
        f"the model has no {structure} that can be removed",
        where="remove=",
        why=f"it has {', '.join(there) or 'none of the structures'}",
        fix="`prunus inspect` lists them, and what is pinned",
    )
