"""Graphs and plans as tables for a terminal, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prunus.graph.amounts import LAYERS, REMOVABLE, Kind
from prunus.graph.axis import Axis, Role
from prunus.graph.coupling import Coupling, CouplingGraph
from prunus.graph.groups import Group, Lockstep, Pin
from prunus.graph.plan_records import spell_count
from prunus.graph.plans import Plan
from prunus.planner.search.sensitivity import Sensitivity
from prunus.structures import find_structures
from prunus.structures.names import Structure


def groups_table(graph: CouplingGraph) -> Table:
    """Every group with its units, and how many axes play which role in it."""
    table = _table("group", "units", "producers", "consumers", "carriers", "remarks")
    for group in graph.groups:
        roles = [role for _, role in group.axes]
        counts = [roles.count(role) for role in (Role.PRODUCER, Role.CONSUMER, Role.CARRIER)]
        _row(table, group.name, group.size, *counts, ", ".join(_remarks(group, graph)))
    return table


def structures_table(graph: CouplingGraph) -> Table | None:
    """Structures by the names that ``remove=`` takes, then other kinds of groups in layers.

    Query heads that share keys are removed several at a time, one of every KV group.  Layers alike
    are in one row; None for a model without attention.
    """
    anatomy = find_structures(graph)
    if not anatomy.attentions:
        return None
    table = _table("structure", "units", "at a time", "in", numbers=("at a time",))
    parts = {name: anatomy.of(*one.kinds) for name, one in REMOVABLE.items()}
    parts |= {f"({kind})": anatomy.of(kind) for kind in _BY_GLOB}
    for name, own in parts.items():
        for place, size, step in _alike(own):
            _row(table, name, size, step, place)
    for stack, layers in anatomy.stacks.items():
        count = len({block.name for block in graph.blocks} & {layer.path for layer in layers})
        if count:
            _row(table, LAYERS, count, 1, stack)
    return table


def _alike(parts: Iterable[Structure]) -> list[tuple[str, int, int]]:
    """Layers of a stack (or a group) that are alike, units, and how many are removed at a time."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for part in parts:
        stack, _, number = part.layer.rpartition(".")
        step = part.each
        key = stack or part.group, part.size * step, step
        found.setdefault(key, []).extend([int(number)] if stack else [])
    return [
        (f"{place}.{_runs(numbers)}" if numbers else place, size, step)
        for (place, size, step), numbers in found.items()
    ]


_BY_GLOB: tuple[Kind, ...] = ("head dims", "qk dims", "vo dims", "routing groups")


def _runs(numbers: Sequence[int]) -> str:
    """Numbers, ascending, as runs.

    >>> _runs([0, 1, 2, 4])
    '0–2,4'
    """
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}–{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """The metric of every group and ratio, and the share that is tolerated."""
    heads = [f"{ratio:.0%}" for ratio in sensitivity.ratios]
    last = ["tolerated"] if sensitivity.tolerated else []
    table = _table("group", "units", *heads, *last, numbers=[*heads, *last])
    for name, size in sensitivity.sizes.items():
        values = [sensitivity.value(name, ratio) for ratio in sensitivity.ratios]
        cells = ["–" if value is None else f"{value:.4g}" for value in values]
        cells += [f"{sensitivity.tolerated.get(name, 0):.0%}" for _ in last]
        _row(table, name, size, *cells)
    return table


def pins_table(pins: Iterable[tuple[Axis, Pin]]) -> Table:
    """What keeps all its positions, by reason and operator."""
    table = _table("pinned because", "operator", "places", "such as", numbers=("places",))
    found: dict[tuple[str, str], list[tuple[Axis, Pin]]] = {}
    for axis, pin in pins:
        found.setdefault((pin.reason, pin.operator), []).append((axis, pin))
    for (reason, operator), entries in found.items():
        axis, pin = entries[0]
        where = f"{axis} ({pin.source})" if pin.source else str(axis)
        _row(table, reason, operator, len(entries), where)
    return table


def chain_table(start: Axis, chain: Sequence[Coupling]) -> Table:
    """A chain of couplings, one operator a row; it is followed from ``start``."""
    table = _table("axis", "tied to", "by", "in module")
    for link in chain:
        end = link.a if link.b == start else link.b
        _row(table, start, end, link.operator, link.module)
        start = end
    return table


def widths_table(plan: Plan) -> Table:
    """Units and width of every group before and after, and what stops it."""
    table = _table("group", "units", "kept", "share", "width", "stopped by", numbers=("width",))
    for choice in plan.groups:
        kept = choice.size - len(choice.removed)
        width = plan.width(choice)
        widths = f"{width.before} → {width.after}" if choice.removed else str(width.before)
        share = f"{kept / max(choice.size, 1):.0%}"
        stop = plan.stopped.get(choice.name, "")
        _row(table, choice.name, choice.size, kept, share, widths, stop)
    return table


def costs_table(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every cost ``before``, as ``requested`` at most, and as ``achieved``; with its share.

    ``pinned`` is what would be left if every unit were removed.
    """
    columns = ("before", "pinned", "at most", "achieved")
    table = _table("cost", *columns, numbers=columns)
    for name, cost in costs.items():
        whole = cost["before"] or 0
        cells = [cost[column] for column in ("before", "pinned", "requested", "achieved")]
        _row(table, name, *("–" if n is None else _with_share(n, whole) for n in cells))
    return table


def stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each state of a model: ``name``, ``params``, ``macs`` and ``bytes``, and where
    they are known ``accuracy`` (in percent) and ``latency_ms`` (by batch size).

    Costs have their share of the first row's beside them.
    """
    graded = any(stage.get("accuracy") is not None for stage in stages)
    batches = list(dict.fromkeys(b for stage in stages for b in stage.get("latency_ms") or ()))
    timed = [f"ms at batch {batch}" for batch in batches]
    table = _table("", *["accuracy"] * graded, "params", "MACs", "bytes", *timed)
    for stage in stages:
        accuracy, times = stage.get("accuracy"), stage.get("latency_ms") or {}
        costs = (_with_share(stage[n], stages[0][n]) for n in ("params", "macs", "bytes"))
        cells = (_number(times.get(batch)) for batch in batches)
        _row(table, stage["name"], *[_number(accuracy, " %")] * graded, *costs, *cells)
    return table


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _with_share(value: int, whole: int) -> str:
    share = f"{value / whole:4.0%}" if whole else "   –"
    return f"{spell_count(value)} {share}"


def _remarks(group: Group, graph: CouplingGraph) -> list[str]:
    found = ["mixing"] if group.mixing else []
    units = set(group.units.tolist())
    for entry in graph.constraints:
        if isinstance(entry, Lockstep) and units.intersection(
            int(unit) for members in entry.sets for unit in members.ravel()
        ):
            found.append(f"{entry.kind}: {entry.reason}")
    return list(dict.fromkeys(found))


_NUMBERS = frozenset({"units", "kept", "share", "producers", "consumers", "carriers"})


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        right = column in _NUMBERS or column in numbers
        right = right or column in {"accuracy", "params", "MACs", "bytes"} or "ms at" in column
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    """Cells are text, never markup: names have brackets."""
    table.add_row(*(Text(str(cell)) for cell in cells))


def describe_graph(graph: CouplingGraph) -> dict[str, Any]:
    """Groups, constraints, pins, unknown operators, outputs and costs of a traced model."""
    anatomy = find_structures(graph)
    return {
        "costs": {name: graph.cost(name) for name in sorted(graph.costs)},
        "tensors": len(graph.shapes) - len(graph.aliases.keys() & graph.shapes.keys()),
        "tied": dict(graph.aliases),
        "units": graph.unit_count,
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "mixing": group.mixing,
                "axes": [{**asdict(axis), "role": role.value} for axis, role in group.axes],
            }
            for group in graph.groups
        ],
        "structures": [_entries(s, "kind", "layer", "group", "size") for s in anatomy.structures],
        "attentions": [
            {**_entries(a, "module", "layer", "kv_heads"), "heads": len(a.heads)}
            for a in anatomy.attentions
        ],
        "constraints": [
            {"kind": getattr(entry, "kind", type(entry).__name__.lower()), "reason": entry.reason}
            for entry in graph.constraints
        ],
        "pins": [describe_pin(*pin) for pin in graph.pins],
        "unknown": dict(sorted(graph.unknown.items())),
        "outputs": list(graph.kept_outputs),
        "inputs": graph.traced.get("inputs"),
    }


def describe_pin(axis: Axis, pin: Pin) -> dict[str, str]:
    """What is pinned, and why."""
    return {"axis": str(axis), **asdict(pin)}


def describe_coupling(coupling: Coupling) -> dict[str, str]:
    """Two axes, and the operator that ties them."""
    ends = {"a": str(coupling.a), "b": str(coupling.b)}
    return {**ends, **_entries(coupling, "operator", "module")}


def _entries(record: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def describe_choices(plan: Plan) -> list[dict[str, Any]]:
    """Units and width of every group before and after, and what stops it where something does."""
    return [
        {
            "name": choice.name,
            "size": choice.size,
            "kept": choice.size - len(choice.removed),
            "width": list(plan.width(choice)),
            "stopped": plan.stopped.get(choice.name),
        }
        for choice in plan.groups
    ]
