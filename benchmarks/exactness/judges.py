"""Two judges that share nothing with the engine, asked for a few words about a pruned model."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import prunus
from tests import shadow, witness

EXPECTED_PINS = ("a convolution needs every position", "keeps its shape")
RATIO = 0.3
"""Of the units of every group."""


def short(text: str, length: int = 300) -> str:
    """One line of at most so many characters."""
    return " ".join(text.split())[:length].strip()


def ask_witness(
    graph: prunus.CouplingGraph,
    model: Any,
    args: Any,
    kwargs: Any,
    *,
    hold: Sequence[str] = (),
    seed: int = 0,
) -> str:
    """What the second witness says of the groups that nothing mixes."""
    held = {*hold, *(group.name for group in graph.groups if group.mixing)}
    if held >= {group.name for group in graph.groups}:
        return "none (all groups mix)"  # a plan of nothing would be refused
    try:
        plan = prunus.plan(
            graph, model, ratio=RATIO, importance="random", hold=sorted(held), seed=seed
        )
        pruned = prunus.apply(plan, copy.deepcopy(model))
    except prunus.PrunusError as error:
        return short(f"not asked: {error}", 120)
    found = witness.testify(plan, model, pruned, args, kwargs, outputs=graph.kept_outputs)
    error = "" if math.isnan(found.rel_err) else f" {found.rel_err:.1e}"
    return short(f"{found.verdict}{error} {found.reason}", 120)


def ask_shadow(plan: prunus.Plan, model: Any, args: Any, kwargs: Any, *, tolerance: float) -> str:
    """What a forward with a mask beside every tensor says of all groups at once, in float64."""
    try:
        pruned = prunus.apply(plan, copy.deepcopy(model)).double()
        gap = shadow.compare(model, pruned, plan.keep, args, kwargs)
    except prunus.PrunusError as error:
        return short(f"not asked: {error}", 120)
    except Exception as error:  # an operator or a type that it does not know
        return short(f"undecided {type(error).__name__}: {error}", 120)
    return f"{'agrees' if gap <= tolerance else 'disagrees'} {gap:.1e}"


def name_pins(graph: prunus.CouplingGraph) -> str:
    """The commonest reasons, each with the operator, module and line of one case."""
    reasons: Counter[str] = Counter()
    where: dict[str, str] = {}
    for _, pin in graph.pins:
        if not any(expected in pin.reason for expected in EXPECTED_PINS):
            reasons[pin.reason] += 1
            where.setdefault(pin.reason, str(pin))
    return "; ".join(f"{where[reason]} x{count}" for reason, count in reasons.most_common(6))
