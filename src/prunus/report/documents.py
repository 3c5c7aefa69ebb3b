"""Reports as plain data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.files import replace_file

if TYPE_CHECKING:
    from prunus.graph.axis import Axis
    from prunus.graph.coupling import Coupling, CouplingGraph
    from prunus.graph.groups import Pin
    from prunus.graph.plan_diff import PlanDiff
    from prunus.graph.plans import Plan


def describe_graph(graph: CouplingGraph) -> dict[str, Any]:
    """Groups, constraints, pins, unknown operators, outputs and costs of a traced model."""
    from prunus.graph.groups import Lockstep
    from prunus.structures import find_structures

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
                "axes": [
                    {"tensor": axis.tensor, "dim": axis.dim, "role": role.value}
                    for axis, role in group.axes
                ],
            }
            for group in graph.groups
        ],
        "structures": [
            {"kind": s.kind, "layer": s.layer, "group": s.group, "size": s.size}
            for s in anatomy.structures
        ],
        "attentions": [
            {"module": a.module, "layer": a.layer, "heads": len(a.heads), "kv_heads": a.kv_heads}
            for a in anatomy.attentions
        ],
        "constraints": [
            {
                "kind": entry.kind if isinstance(entry, Lockstep) else "nonempty",
                "reason": entry.reason,
            }
            for entry in graph.constraints
        ],
        "pins": [describe_pin(axis, pin) for axis, pin in graph.pins],
        "unknown": dict(sorted(graph.unknown.items())),
        "outputs": list(graph.kept_outputs),
        "inputs": graph.traced.get("inputs"),
    }


def describe_pin(axis: Axis, pin: Pin) -> dict[str, str]:
    """What is pinned, and why."""
    return {
        "axis": str(axis),
        "reason": pin.reason,
        "operator": pin.operator,
        "module": pin.module,
        "source": pin.source,
    }


def describe_coupling(coupling: Coupling) -> dict[str, str]:
    """Two axes, and the operator that ties them."""
    return {
        "a": str(coupling.a),
        "b": str(coupling.b),
        "operator": coupling.operator,
        "module": coupling.module,
    }


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


def describe_diff(diff: PlanDiff) -> dict[str, Any]:
    """What two plans, *a* and *b*, remove differently, and what both cost."""
    from prunus.graph.plan_json import to_ranges

    return {
        "costs": {
            name: {
                "before": a.before,
                **{side: {"after": c.after, "share": c.share} for side, c in (("a", a), ("b", b))},
            }
            for name, (a, b) in diff.costs.items()
        },
        "drops": {"only_a": list(diff.only_a), "only_b": list(diff.only_b)},
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "kept": list(group.kept),
                "only_a": to_ranges(group.only_a),
                "only_b": to_ranges(group.only_b),
            }
            for group in diff.groups
        ],
    }


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """Strict JSON: numbers that are not finite become null.

    >>> to_json({"error": float("inf"), "by": (1, 2)}, indent=None)
    '{"error": null, "by": [1, 2]}'
    """
    return json.dumps(_finite(document), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(document: Any, path: str | os.PathLike[str]) -> None:
    """Write a document as JSON."""
    text = to_json(document) + "\n"
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
