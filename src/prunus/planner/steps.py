"""Quanta: sets of units that leave together, in chains that say in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Lockstep
from prunus.planner.alignment import RoundTo, aligned_labels
from prunus.planner.lockstep import Tie, merge_locksteps
from prunus.planner.rounding import Chain, Cut, align

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Quanta:
    """All quanta; their ids are 1 … ``len(scores) - 1``.

    Attributes
    ----------
    owner
        The quantum of every unit, shape ``(unit_count + 1,)``; 0 for units that always stay.
    chains, totals
        Quanta in the order in which they leave, the least important first; how many units
        compete in each chain.
    gates
        Quanta without which no other of their chain may leave: they bring a dim into line.
    sizes, scores
        Units in every quantum, and the sum of their scores.
    share
        Rows of a quantum, a group's number, and how many of its units the quantum holds; ascending.
    shares
        The same for every quantum: pairs of a group's number and its units.
    untouched
        Names of groups that lose nothing whatever the budget, with the reason.
    conflicts
        What contradictory locksteps say, if there are such.
    rounded
        Whether a width has to be a multiple of something.
    """

    owner: Ints
    chains: tuple[Ints, ...]
    totals: tuple[int, ...]
    gates: frozenset[int]
    sizes: Ints
    scores: NDArray[np.float64]
    share: Ints
    shares: tuple[tuple[tuple[int, int], ...], ...]
    untouched: Mapping[str, str]
    conflicts: tuple[str, ...]
    rounded: bool

    def groups_of(self, chain: Ints) -> list[int]:
        """Numbers of the groups that a chain takes units of, ascending."""
        return sorted({group for quantum in chain.tolist() for group, _ in self.shares[quantum]})

    def kept(self, removed: Mask) -> Mask:
        """Units that are kept when the quanta of a mask are removed."""
        gone = removed.copy()
        gone[0] = False
        return np.asarray(~gone[self.owner], dtype=np.bool_)


def form_quanta(
    graph: CouplingGraph,
    scores: NDArray[np.float64],
    excluded: Mapping[str, str],
    round_to: RoundTo,
) -> Quanta:
    """Quanta of all groups but the ``excluded`` ones (name → reason); inf units never leave."""
    untouched = dict(excluded)
    conflicts, chains = _form_chains(graph, scores, untouched)
    live = [group for group in graph.groups if group.name not in untouched]
    labels = aligned_labels(graph, untouched, round_to)
    cuts = align(chains, labels, graph.unit_count)
    owner, ordered, gates = _number(cuts, graph.unit_count)
    group_of = np.full(graph.unit_count + 1, -1, dtype=np.int64)
    for n, group in enumerate(graph.groups):
        group_of[group.units] = n
    count = int(owner.max(initial=0))
    finite = np.where(owner > 0, scores, 0.0)
    share = _share(owner, group_of)
    for group in live:
        if not np.isfinite(scores[group.units]).any():
            untouched[group.name] = "kept whole: its scores are infinite"
        elif not owner[group.units].any():
            needed = lcm(*(n for label, n in labels if np.isin(group.units, label).any()))
            untouched[group.name] = f"it can't be cut to multiples of {needed}"
    return Quanta(
        owner=owner,
        chains=tuple(ordered),
        totals=tuple(cut.chain.total for cut in cuts if cut.step),
        gates=frozenset(gates),
        sizes=np.bincount(owner[1:], minlength=count + 1),
        scores=np.bincount(owner, weights=finite, minlength=count + 1).astype(np.float64),
        share=share,
        shares=_pairs(share, count),
        untouched=untouched,
        conflicts=tuple(conflicts),
        rounded=any(multiple > 1 for _, multiple in labels),
    )


def _form_chains(
    graph: CouplingGraph, scores: NDArray[np.float64], untouched: dict[str, str]
) -> tuple[list[str], list[Chain]]:
    """A chain per tie of locksteps, and one per group for the rest of its units."""
    ties = merge_locksteps([c for c in graph.constraints if isinstance(c, Lockstep)])
    conflicts = []
    for tie in ties:
        if tie.conflict:
            units = np.concatenate(tie.sets)
            names = [g.name for g in graph.groups if np.isin(g.units, units).any()]
            untouched.update(dict.fromkeys(names, f"locksteps contradict: {tie.conflict}"))
            conflicts.append(f"{', '.join(names)} ({tie.conflict})")
    free, tied = np.zeros((2, graph.unit_count + 1), dtype=np.bool_)
    for group in graph.groups:
        free[group.units] = group.name not in untouched and np.isfinite(scores[group.units])
    chains = []
    for tie in ties:
        tied[np.concatenate(tie.sets)] = True
        chains.append(_chain_of_tie(tie, free, scores))
    for group in graph.groups:
        own = group.units[~tied[group.units]]
        chains.append(Chain(_ascending(own[free[own]], scores)[:, None], len(own)))
    return conflicts, [chain for chain in chains if chain.rows.size]


def _chain_of_tie(tie: Tie, free: Mask, scores: NDArray[np.float64]) -> Chain:
    rows = [_ascending(units[free[units]], scores) for units in tie.sets]
    length = min(len(row) // rate for row, rate in zip(rows, tie.rates, strict=True))
    parts = [
        row[: length * rate].reshape(length, rate)
        for row, rate in zip(rows, tie.rates, strict=True)
    ]
    return Chain(np.concatenate(parts, axis=1), sum(len(units) for units in tie.sets))


def _ascending(units: Ints, scores: NDArray[np.float64]) -> Ints:
    return units[np.argsort(scores[units], kind="stable")]


def _number(cuts: Sequence[Cut], unit_count: int) -> tuple[Ints, list[Ints], set[int]]:
    """Number the quanta; returns the owner of every unit, the chains, and the gates."""
    owner = np.zeros(unit_count + 1, dtype=np.int64)
    joints: dict[int, int] = {}
    ordered: list[Ints] = []
    gates: set[int] = set()
    following = 1
    for cut in cuts:
        if not cut.step:
            continue
        ids: list[Ints] = []
        if cut.first or cut.joint >= 0:
            gate = joints.get(cut.joint, following)
            if gate == following:
                following += 1
            if cut.joint >= 0:
                joints[cut.joint] = gate
            owner[cut.chain.rows[: cut.first]] = gate
            gates.add(gate)
            ids.append(np.array([gate], dtype=np.int64))
        rest = cut.chain.rows[cut.first :]
        count = len(rest) // cut.step
        own = following + np.arange(count, dtype=np.int64)
        owner[rest[: count * cut.step]] = np.repeat(own, cut.step)[:, None]
        following += count
        ordered.append(np.concatenate([*ids, own]))
    return owner, ordered, gates


def _share(owner: Ints, group_of: Ints) -> Ints:
    """Which groups every quantum draws on, and how many units of each."""
    units = np.flatnonzero((owner > 0) & (group_of >= 0))
    groups = int(group_of.max(initial=0)) + 1
    code, times = np.unique(owner[units] * groups + group_of[units], return_counts=True)
    return np.stack([code // groups, code % groups, times], axis=1)


def _pairs(share: Ints, count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The rows of every quantum, without it; equal ones are one object."""
    single: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
    shares: list[tuple[tuple[int, int], ...]] = [()] * (count + 1)
    for quantum, group, units in share.tolist():
        one = single.setdefault((group, units), ((group, units),))
        shares[quantum] = shares[quantum] + one if shares[quantum] else one
    return tuple(shares)
