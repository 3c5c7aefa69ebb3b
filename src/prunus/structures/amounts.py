"""What may be asked to be removed, by structure, and how many units of each group that comes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from prunus.errors import PlanError
from prunus.graph.coupling import CouplingGraph
from prunus.graph.renaming import Renaming
from prunus.structures.names import Anatomy, Kind, Structure, find_structures

Amount = float | int | str
"""A share in [0, 1), as 0.3 or ``"30%"``, or a count, as 2; ``1`` is one unit."""

Remove = Mapping[str, Amount | Mapping[int | str, Amount]]
"""Amounts by structure: one for every layer, or amounts by the layer's number or path."""

LAYERS = "layers"


@dataclass(frozen=True)
class Removable:
    """A structure that can be named: the kinds of its groups, and what is removed of it."""

    kinds: tuple[Kind, ...]
    text: str


REMOVABLE: Mapping[str, Removable] = {
    "heads": Removable(
        ("heads", "query heads"), "attention heads, the same number of every KV group"
    ),
    "kv_groups": Removable(("kv groups",), "key and value heads, with the query heads they serve"),
    "ffn": Removable(("ffn",), "inner width of feed-forward blocks"),
    "experts": Removable(("experts",), "whole experts, with their rows of the router"),
    "hidden": Removable(("hidden",), "width of the residual stream"),
    LAYERS: Removable((), "whole layers, those of least influence"),
}
"""The structures by the names of ``remove=`` and of the flags of the command line."""


def read_amount(value: Any) -> float | int | None:
    """A share as a float, a count as an int; None for what is neither.

    >>> [read_amount(value) for value in ("25%", "0.3", "2", 1, 1.0, "100%", True)]
    [0.25, 0.3, 2, 1, None, None, None]
    """
    if isinstance(value, str):
        value = _read(value.strip())
    if isinstance(value, bool) or not isinstance(value, Real) or value < 0:
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if float(value) < 1 else None


def _read(text: str) -> float | int | None:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        return None


def check_remove(remove: Mapping[Any, Any]) -> None:
    """Refuse structures that there are not, and amounts that are no share and no count.

    Raises
    ------
    PlanError
        The message names the structures, or says what an amount is.
    """
    for name, asked in remove.items():
        if name not in REMOVABLE:
            raise PlanError(
                f"no structure is called {name!r}",
                where="remove=",
                why=f"the structures are {', '.join(REMOVABLE)}",
            )
        for where, amount in _amounts(f"remove[{name!r}]", asked):
            if read_amount(amount) is None:
                raise PlanError(
                    f"{where}={amount!r} is no amount to remove",
                    why="a float or a percentage is a share below 1, an int is a count",
                    fix="0.3 or '30%' is a share of every layer, 2 is two of every layer",
                )


def _amounts(option: str, asked: Any) -> Iterator[tuple[str, Any]]:
    for layer, amount in asked.items() if isinstance(asked, Mapping) else [(None, asked)]:
        if isinstance(layer, bool) or not isinstance(layer, int | str | None):
            raise PlanError(
                f"{layer!r} is no layer", where=option, fix="name a layer by its number or path"
            )
        yield option if layer is None else f"{option}[{layer!r}]", amount


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
            part.group: _units(part, structure, read_amount(amount))
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


def _units(part: Structure, structure: str, amount: float | int | None) -> Asked:
    if isinstance(amount, float):
        return Asked(amount * part.size, counted=False)
    assert amount is not None  # checked at the edge
    each = part.heads if part.kind == "query heads" else 1
    size, where = part.size * each, part.layer or part.group
    if amount >= size:
        raise PlanError(
            f"{amount} {structure} can't be removed of {size}",
            where=where,
            why="one has to be kept" if each == 1 else "one of every KV group has to be kept",
            fix=f"remove at most {size - each}; remove={{'layers': 1}} drops whole layers",
        )
    if amount % each:
        raise PlanError(
            f"{amount} heads can't be removed of {size}",
            where=where,
            why=f"each of the {each} KV groups has to lose equally many",
            fix=f"give a multiple of {each}, or remove whole KV groups: remove={{'kv_groups': 1}}",
        )
    return Asked(amount // each, counted=True)


def _lacking(graph: CouplingGraph, anatomy: Anatomy, structure: str) -> PlanError:
    there = [name for name in REMOVABLE if parts_of(anatomy, name)]
    there += [LAYERS] if graph.blocks else []
    return PlanError(
        f"the model has no {structure} that can be removed",
        where="remove=",
        why=f"it has {', '.join(there) or 'none of the structures'}",
        fix="`prunus inspect` lists them, and what is pinned",
    )
