"""Whether removing each group alone moves the outputs: else a comparison says nothing of it."""

from __future__ import annotations

from prunus.exchange import relative_error
from prunus.verifier.case import Case

MOVED = 1e-3
"""Removing a group has to move the output by this much, or the comparison verifies nothing."""


def each_alone(case: Case) -> dict[str, float]:
    """By touched group: how far its removal alone moves the outputs."""
    moved: dict[str, float] = {}
    for group in case.graph.groups:
        if case.kept[group.units].all():
            continue
        alone = case.graph.all_kept
        alone[group.units] = case.kept[group.units]
        moved[group.name] = relative_error(case.dense, case.replay.run(alone))
    return moved
