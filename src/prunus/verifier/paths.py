"""Comparisons of sizes by which the forward takes one path or another, after the cut."""

from __future__ import annotations

from prunus.graph.solve import other_paths, solve
from prunus.verifier.case import Case


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
