"""Pictures, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import checks_options, require
from prunus.files import replace_file
from prunus.graph.plan_records import GroupChoice
from prunus.graph.plans import Plan
from prunus.planner.search.sensitivity import Sensitivity

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


@checks_options
def draw_sensitivity(
    table: Sensitivity, path: str | os.PathLike[str], *, title: str = "", metric: str = "metric"
) -> None:
    """Draw by how much the metric falls, for every group and ratio.

    The picture is an SVG or a PDF if the path ends so, else a PNG.  Cells that a group can't reach
    stay white; a tick marks the share that is tolerated, where that was searched for.

    Raises
    ------
    MissingExtraError
        Without matplotlib; the message names the extra.
    """
    figures = require("matplotlib.figure", "plot")
    rows, columns = len(table.sizes), len(table.ratios)
    figure = figures.Figure(
        figsize=(4.5 + 0.55 * columns, 1.6 + 0.3 * max(rows, 3)), layout="constrained"
    )
    axes = figure.add_subplot()
    loss = np.array(
        [
            [np.nan if (v := table.value(name, ratio)) is None else table.dense - v
             for ratio in table.ratios]
            for name in table.sizes
        ]
    )  # fmt: skip
    top = max(float(np.nanmax(loss, initial=0.0)), 1e-12)
    image = axes.imshow(loss, cmap="YlOrRd", vmin=0.0, vmax=top, aspect="auto")
    _write_values(axes, loss, top)
    _mark_tolerated(axes, table)
    axes.set_xticks(range(columns), [f"{ratio:.0%}" for ratio in table.ratios], fontsize=8)
    axes.set_yticks(range(rows), [short_name(name) for name in table.sizes], fontsize=8)
    axes.set_xlabel("units that the group loses, all others whole")
    axes.set_title(title or "What the loss of units costs", loc="left", fontsize=10, color=TEXT)
    axes.tick_params(length=0)
    figure.colorbar(image, label=f"loss of {metric} (dense: {table.dense:.4g})")
    save_figure(figure, path)


def _write_values(axes: Any, loss: np.ndarray[Any, np.dtype[np.float64]], top: float) -> None:
    for (row, column), value in np.ndenumerate(loss):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * top else TEXT
            axes.text(
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour
            )


def _mark_tolerated(axes: Any, table: Sensitivity) -> None:
    """A tick where the tolerated share lies between the ratios' columns."""
    for row, name in enumerate(table.sizes):
        if name in table.tolerated and table.ratios:
            at = float(np.interp(table.tolerated[name], table.ratios, range(len(table.ratios))))
            axes.plot([at, at], [row - 0.45, row + 0.45], color="#2a6fbb", linewidth=2)
