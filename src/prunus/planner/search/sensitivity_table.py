"""What a metric says when groups lose units, one group at a time: a table, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from prunus.errors import FormatError, PlanError, checks_options
from prunus.files import replace_file

FORMAT, VERSION = "prunus sensitivity", 2

READABLE = (1, 2)
"""Version 1 says the same."""


class _Head(msgspec.Struct, frozen=True):
    format: Any
    version: Any


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    units: int
    metric: dict[int, float | None]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    origin: dict[str, Any]
    dense: float
    ratios: tuple[float, ...]
    tolerance: float | None
    tolerated: dict[str, float]
    groups: tuple[_Group, ...]


@checks_options
@dataclass(frozen=True)
class Sensitivity:
    """A metric by group and by the units that the group has lost, everything else whole.

    Attributes
    ----------
    dense
        The metric of the whole model; more is better.
    ratios
        The ratios of the table, ascending.
    sizes
        Units of every group of the table, in the model's order.  Groups that lose units together
        are one row, that of the first.
    curves
        Group → number of units asked to go → metric; None where the group can't lose as many.
        Beside the ratios' own numbers, those that the search for a tolerated loss looked at.
    tolerated
        Group → the largest share found by which the metric falls by at most ``tolerance``; empty
        if that was not asked for.
    tolerance
        The loss of the metric that is tolerated; None if that was not asked for.
    origin
        What the numbers were made with: the importance, the seed and a fingerprint of weights and
        scores.
    """

    dense: float
    ratios: tuple[float, ...]
    sizes: Mapping[str, int]
    curves: Mapping[str, Mapping[int, float | None]]
    tolerated: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def value(self, group: str, ratio: float) -> float | None:
        """The metric of a cell; None where the group can't lose as many units.

        >>> one = Sensitivity(0.9, (0.5,), {"a": 4}, {"a": {0: 0.9, 2: 0.7}})
        >>> one.value("a", 0.5)
        0.7
        """
        return self.curves[group].get(units_at(self.sizes[group], ratio))

    def ratios_at(self, loss: float) -> dict[str, float]:
        """For every group the largest share by which the metric falls by at most ``loss``.

        Between the numbers of units that were measured the metric is taken for a straight line;
        the first time that it falls below the bound decides.  It is what
        :func:`prunus.plan` takes as ``ratios``.

        Raises
        ------
        PlanError
            If the loss is negative or no number.

        Examples
        --------
        >>> one = Sensitivity(0.9, (0.5,), {"a": 4}, {"a": {0: 0.9, 2: 0.7}})
        >>> round(one.ratios_at(0.1)["a"], 3), one.ratios_at(1.0)
        (0.25, {'a': 0.5})
        """
        check_loss(loss, "loss")
        return {
            group: _crossing(self.curves[group], self.dense - loss) / size
            for group, size in self.sizes.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; what stands there is the old table or this one, never half of it."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "origin": dict(self.origin),
            "dense": self.dense,
            "ratios": list(self.ratios),
            "tolerance": self.tolerance,
            "tolerated": dict(self.tolerated),
            "groups": [
                {"name": name, "units": size, "metric": self.curves.get(name, {})}
                for name, size in self.sizes.items()
            ],
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FormatError
            If it is something else, or of another version.
        """
        try:
            content = Path(path).read_bytes()
            head = msgspec.json.decode(content, type=_Head)
            if head.format != FORMAT or head.version not in READABLE:
                raise ValueError(f"it is {head.format!r} version {head.version!r}")
            document = msgspec.json.decode(content, type=_Document)
            if any(
                group.units < 0 or min(group.metric, default=0) < 0 for group in document.groups
            ):
                raise ValueError("a number of units is negative")
        except (OSError, ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
            raise FormatError(
                f"{path} is no table of sensitivities that can be read",
                why=f"{type(error).__name__}: {error}",
                fix="give a file that sensitivity(path=…) wrote, or remove it to start anew",
            ) from error
        return cls(
            dense=document.dense,
            ratios=document.ratios,
            sizes={group.name: group.units for group in document.groups},
            curves={group.name: group.metric for group in document.groups},
            tolerated=document.tolerated,
            tolerance=document.tolerance,
            origin=document.origin,
        )


def check_loss(loss: object, option: str) -> None:
    """Refuse a tolerated loss that is none."""
    if not isinstance(loss, (int, float)) or not math.isfinite(loss) or loss < 0:
        raise PlanError(
            f"{option}={loss!r} is no loss of a metric",
            why="it is by how much the metric may fall, where more is better",
            fix=f"give a number from 0 on: {option}=0.01, say",
        )


def units_at(size: int, ratio: float) -> int:
    """The whole number of units that is nearest to a share.

    >>> units_at(10, 0.25), units_at(8, 0.5)
    (3, 4)
    """
    return math.floor(ratio * size + 0.5)


def _crossing(curve: Mapping[int, float | None], bound: float) -> float:
    """How many units can go before the curve first falls below the bound."""
    last, before = 0, math.inf
    for units in sorted(curve):
        value = curve[units]
        if value is None:
            break
        if value < bound:
            return (
                last
                if before == math.inf
                else last + (units - last) * (before - bound) / (before - value)
            )
        last, before = units, value
    return last
