"""What a pass over calibration data adds up, and how two passes over parts of it are added.

Sums of one kind can be added: those of the same needs, at the same places of the same graph.  A
kind is plain data, so that a file or another process can tell its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.calibration.activations import Site
from prunus.calibration.confidence import Heads
from prunus.calibration.second_moments import Moments
from prunus.errors import DataError


@dataclass(eq=False)
class Sums:
    """Sums over samples, while they grow.

    Attributes
    ----------
    needs, unit_count, sites, heads
        As in :class:`~prunus.calibration.statistics.Statistics`.
    samples
        How many were added.
    losses
        Sum of their losses; 0 without gradients.
    units
        By name, arrays of shape ``(unit_count + 1,)``; empty before the first gradient.
    """

    needs: frozenset[str]
    unit_count: int
    sites: tuple[Site, ...] = ()
    heads: tuple[Heads, ...] = ()
    samples: int = 0
    losses: float = 0.0
    units: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def moments(self) -> list[Moments]:
        """Those of the sites, each once however many share it."""
        return list({id(s.moments): s.moments for s in self.sites if s.moments}.values())

    def kind(self) -> dict[str, Any]:
        """What has to be equal for sums to be added up, as JSON."""
        numbers = {id(moments): n for n, moments in enumerate(self.moments)}
        sites = []
        for site in self.sites:
            told = f"{site.tensor or site.module}, {_told(site.label)}"
            if site.window.kernel:
                told += f", {site.window}"
            if site.moments is not None:
                blocks = site.moments.blocks
                told += f", second moments {numbers[id(site.moments)]} in {blocks} blocks"
            sites.append(told)
        heads = [f"{one.module}, dim {one.dim}, {_told(one.label)}" for one in self.heads]
        needs = ", ".join(sorted(self.needs))
        return {"needs": needs, "units": self.unit_count, "sites": sites, "heads": heads}

    def counts(self) -> dict[str, Any]:
        """All that is no array, as JSON: how much was seen where, and which arrays there are."""
        return {
            "samples": self.samples,
            "losses": self.losses,
            "units": sorted(self.units),
            "sites": [site.count for site in self.sites],
            "parts": [sorted(map(list, site.weights)) for site in self.sites],
            "moments": [moments.count for moments in self.moments],
            "heads": [heads.count for heads in self.heads],
        }

    def blank(self) -> Sums:
        """Sums of nothing, of the same kind."""
        fresh = {id(m): Moments(m.groups, m.columns, m.blocks) for m in self.moments}
        sites = [
            Site(s.tensor, s.module, s.label, window=s.window, moments=fresh.get(id(s.moments)))
            for s in self.sites
        ]
        heads = [Heads(one.module, one.dim, one.label) for one in self.heads]
        return Sums(self.needs, self.unit_count, tuple(sites), tuple(heads))

    def add(self, other: Sums) -> None:
        """Add sums over other samples.

        Raises
        ------
        DataError
            If they are of another kind.
        """
        found = differences(self.kind(), other.kind(), ("here", "there"))
        if found:
            raise DataError(
                "statistics of different passes can't be added up",
                why="\n".join(found),
                fix="collect both with the same graph, needs, plan and options",
            )
        for site, more in zip(self.sites, other.sites, strict=True):
            site.merge(more)
        for moments, others in zip(self.moments, other.moments, strict=True):
            moments.merge(others)
        for heads, seen in zip(self.heads, other.heads, strict=True):
            heads.merge(seen)
        for name, values in other.units.items():
            self.units[name] = self.units.get(name, 0.0) + values
        self.samples += other.samples
        self.losses += other.losses


def differences(
    left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, str]
) -> list[str]:
    """Where two kinds differ, in words; of lists the first entry that does.

    >>> differences({"seed": 0, "needs": ["a"]}, {"seed": 1, "needs": ["a", "b"]}, ("now", "then"))
    ['needs: nothing now, b then', 'seed: 0 now, 1 then']
    """
    found = []
    for key in sorted({*left, *right}):
        a, b = left.get(key, "nothing"), right.get(key, "nothing")
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            a, b = next((x, y) for x, y in zip_longest(a, b, fillvalue="nothing") if x != y)
        found.append(f"{key}: {a} {names[0]}, {b} {names[1]}")
    return found


def _told(label: NDArray[np.int64]) -> str:
    """A label in a few words, different for different ones."""
    content = hashlib.sha256(repr(label.shape).encode())
    content.update(np.ascontiguousarray(label, dtype="<i8").data)
    return f"{len(label)} positions with units {content.hexdigest()[:12]}"
