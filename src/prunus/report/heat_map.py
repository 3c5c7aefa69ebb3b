"""The heat map of sensitivities: groups down, ratios across, the loss of the metric as colour."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from prunus.errors import checks_options, require
from prunus.planner.search.sensitivity_table import Sensitivity
from prunus.report.pictures import TEXT, save_figure, short_name


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
