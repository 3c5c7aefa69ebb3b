"""Pictures, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import checks_options, require
from prunus.files import replace_file
from prunus.graph.plans import GroupChoice, Plan

KEPT, REMOVED, TEXT = "#2a6fbb", "#f0b27a", "#333333"

# Without dates and the version of matplotlib in the file, the same plan makes the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}

_ROWS = 60
"""Groups in one picture; of a deeper model those with the most units are drawn."""


@checks_options
def draw_channels(plan: Plan, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw the units of every group, those that stay and those that go.

    The picture is an SVG or a PDF if the path ends so, else a PNG.

    One bar for each group, from the model's input at the top to its output at the bottom; each
    removed unit is marked at its place.

    Raises
    ------
    MissingExtraError
        Without matplotlib; the message names the extra.
    """
    figures = require("matplotlib.figure", "plot")
    choices = _widest(plan.groups)
    figure = figures.Figure(figsize=(10, 1.3 + 0.26 * max(len(choices), 3)), layout="constrained")
    axes = figure.add_subplot()
    for row, choice in enumerate(choices):
        _draw_row(axes, row, choice)
    _dress(axes, choices, title or "Kept and removed units")
    if len(choices) < len(plan.groups):
        axes.set_xlabel(f"units; the {len(choices)} widest of {len(plan.groups)} groups")
    save_figure(figure, path)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure of matplotlib as SVG or PDF if the path ends so, else as PNG."""
    settings = require("matplotlib", "plot")
    ending = os.fspath(path)[-4:].lower()
    kind = ending[1:] if ending in _METADATA else "png"

    def write(draft: Path) -> None:
        with settings.rc_context({"svg.hashsalt": "prunus"}):
            figure.savefig(draft, format=kind, dpi=120, metadata=_METADATA[f".{kind}"])

    replace_file(path, write)


def _widest(groups: tuple[GroupChoice, ...]) -> list[GroupChoice]:
    """At most so many groups, in the model's order."""
    ranked = sorted(range(len(groups)), key=lambda index: (-groups[index].size, index))
    return [groups[index] for index in sorted(ranked[:_ROWS])]


def _draw_row(axes: Any, row: int, choice: GroupChoice) -> None:
    gone = np.zeros(choice.size, dtype=np.bool_)
    gone[list(choice.removed)] = True
    for colour, chosen in ((KEPT, ~gone), (REMOVED, gone)):
        axes.broken_barh(_runs(chosen), (row - 0.38, 0.76), color=colour, linewidth=0)
    kept = choice.size - len(choice.removed)
    units = f"{kept} of {choice.size}" if choice.removed else f"{choice.size}"
    axes.annotate(
        units,
        (choice.size, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=TEXT,
    )


def _runs(chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """Runs of true entries as (start, length)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _dress(axes: Any, choices: list[GroupChoice], title: str) -> None:
    axes.set_yticks(
        range(len(choices)), [short_name(choice.name) for choice in choices], fontsize=8
    )
    axes.set_ylim(len(choices) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max((choice.size for choice in choices), default=1))
    axes.set_xlabel("units")
    axes.set_title(title, loc="left", fontsize=10, color=TEXT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for colour, label in ((KEPT, "kept"), (REMOVED, "removed")):
        axes.bar(0, 0, color=colour, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)


def short_name(name: str) -> str:
    """A label that leaves room for its bar: the end of a name says most."""
    return name if len(name) <= 40 else "…" + name[-39:]
