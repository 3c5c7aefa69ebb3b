"""Quanta: sets of units that leave together, in chains that say in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from prunus.graph.axis import Label, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.planner.chains import form_chains
from prunus.planner.rounding import Cut, RoundTo, align, aligned_labels

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
    chains, conflicts = form_chains(graph, scores, untouched)
    labels = aligned_labels(graph, untouched, round_to)
    cuts = [cut for cut in align(chains, labels, graph.unit_count) if cut.step]
    owner, ordered, gates = _number(cuts, graph.unit_count)
    group_of = np.full(graph.unit_count + 1, -1, dtype=np.int64)
    for n, group in enumerate(graph.groups):
        group_of[group.units] = n
        if group.name not in untouched and (reason := _why_whole(group, scores, owner, labels)):
            untouched[group.name] = reason
    count = int(owner.max(initial=0))
    finite = np.where(owner > 0, scores, 0.0)
    share = _share(owner, group_of)
    return Quanta(
        owner=owner,
        chains=tuple(ordered),
        totals=tuple(cut.chain.total for cut in cuts),
        gates=frozenset(gates),
        sizes=np.bincount(owner[1:], minlength=count + 1),
        scores=np.bincount(owner, weights=finite, minlength=count + 1).astype(np.float64),
        share=share,
        shares=_pairs(share, count),
        untouched=untouched,
        conflicts=tuple(conflicts),
        rounded=any(multiple > 1 for _, multiple in labels),
    )


def _why_whole(
    group: Group, scores: NDArray[np.float64], owner: Ints, labels: Sequence[tuple[Label, int]]
) -> str:
    """Why no unit of a group may leave; empty where one may."""
    if not np.isfinite(scores[group.units]).any():
        return "kept whole: its scores are infinite"
    if owner[group.units].any():
        return ""
    needed = lcm(*(n for label, n in labels if np.isin(group.units, label).any()))
    return f"it can't be cut to multiples of {needed}"


def _number(cuts: Sequence[Cut], unit_count: int) -> tuple[Ints, list[Ints], set[int]]:
    """Number the quanta; returns the owner of every unit, the chains, and the gates."""
    owner = np.zeros(unit_count + 1, dtype=np.int64)
    joints: dict[int, int] = {}
    ordered: list[Ints] = []
    gates: set[int] = set()
    following = 1
    for cut in cuts:
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


def find_stops(
    graph: CouplingGraph, quanta: Quanta, removed: Mask, floors: Sequence[int]
) -> dict[str, str]:
    """Names of the groups that can lose no more, with the reason; of the others nothing is said.

    Parameters
    ----------
    quanta, removed
        What may leave, and which of it is gone, shape ``(quanta + 1,)``.
    floors
        Units that every group keeps at least.
    """
    found = dict(quanta.untouched)
    kept = quanta.kept(removed)
    left = [int(kept[group.units].sum()) for group in graph.groups]
    steps = _next_steps(quanta, removed)
    for number, group in enumerate(graph.groups):
        if group.name not in found:
            reason = _reason(number, steps.get(number, []), left, floors)
            found |= {group.name: reason} if reason else {}
    return {group.name: found[group.name] for group in graph.groups if group.name in found}


def _reason(
    number: int, ahead: Sequence[Mapping[int, int]], left: Sequence[int], floors: Sequence[int]
) -> str:
    """Why a group can lose no more; empty where it can."""
    if not ahead:
        return "the rest of it is kept whole"
    if all(left[number] - shares[number] < floors[number] for shares in ahead):
        step = min(shares[number] for shares in ahead)
        in_steps = f", and goes in steps of {step}" if step > 1 else ""
        return f"it keeps {floors[number]} at least{in_steps}"
    stuck = all(any(left[g] - n < floors[g] for g, n in shares.items()) for shares in ahead)
    return "it is tied to a group that can lose no more" if stuck else ""


def _next_steps(quanta: Quanta, removed: Mask) -> dict[int, list[dict[int, int]]]:
    """For every group the next quantum of each of its chains: units by group's number."""
    steps: dict[int, list[dict[int, int]]] = {}
    for chain in quanta.chains:
        there = np.flatnonzero(~removed[chain])
        shares = dict(quanta.shares[int(chain[there[0]])]) if len(there) else {}
        for number in shares:
            steps.setdefault(number, []).append(shares)
    return steps
