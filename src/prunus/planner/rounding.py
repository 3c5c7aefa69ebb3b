"""Rounding: how many rows of a chain must go at once so that every cut dim stays aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm, prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunus.graph.axis import Label

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chain:
    """Units that leave in this order.

    Attributes
    ----------
    rows
        Shape ``(length, members)``: the units of a row go together, the least important first.
    total
        How many units compete here, those that never go included.
    """

    rows: Ints
    total: int


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain in quanta: ``first`` rows (if any) before all others, then ``step`` rows at a time.

    ``step`` is 0 for a chain that has to stay as it is.  Cuts with the same ``joint`` ≥ 0 share
    their first quantum, since they share a dim that is aligned only when all of it is gone.
    """

    chain: Chain
    first: int
    step: int
    joint: int = -1


@dataclass(eq=False, slots=True)
class _Dim:
    """Width of a dim: ``fixed`` + Σ lone · length + Σ products · lengths, chains by number.

    A position may count several times.
    """

    fixed: int
    lone: dict[int, tuple[int, int]]  # per row (modulo the modulus), in all
    products: list[tuple[tuple[int, ...], int]]  # chains, positions per combination of rows
    ragged: set[int]  # chains whose rows cross without making a full grid


def align(
    chains: Sequence[Chain], labels: Sequence[tuple[Label, int]], unit_count: int
) -> tuple[Cut, ...]:
    """Cuts after each of which every dim that lost something is a multiple of its number.

    A chain whose rows fill different numbers of positions becomes several.

    >>> chain = Chain(np.arange(1, 21)[:, None], 20)
    >>> [(cut.first, cut.step) for cut in align([chain], [(np.arange(1, 21)[:, None], 8)], 20)]
    [(4, 8)]
    >>> heads = np.repeat(np.arange(1, 21), 4)[:, None]
    >>> [(cut.first, cut.step) for cut in align([chain], [(heads, 8)], 20)]
    [(0, 2)]
    """
    modulus = lcm(*(multiple for _, multiple in labels))
    if modulus == 1:
        return tuple(Cut(chain, 0, 1) for chain in chains)
    # To be a multiple of 4 is, for a position that counts twice, to be a multiple of 8.
    weighted = [(label, modulus // multiple) for label, multiple in labels]
    chains = _split(chains, weighted, unit_count, modulus)
    layout = _Layout(chains, unit_count)
    dims = [_measure(label, weight, layout, modulus) for label, weight in weighted]
    sizes = [len(chain.rows) for chain in chains]
    frozen: set[int] = set().union(*(dim.ragged for dim in dims))
    while True:
        allowed, stuck = _residues(dims, sizes, modulus, frozen)
        cuts = {}
        for n, chain in enumerate(chains):
            cuts[n] = Cut(chain, 0, 0) if n in frozen else _cut(chain, allowed[n])
            if n not in frozen and not cuts[n].step:
                stuck.add(n)
        if not stuck:
            return _join(cuts, dims, frozen)
        frozen |= stuck


def _cut(chain: Chain, allowed: NDArray[np.bool_]) -> Cut:
    """The cut of a chain whose length may be these residues; step 0 where none is possible."""
    size, modulus, residues = len(chain.rows), len(allowed), np.flatnonzero(allowed)
    if not len(residues):
        return Cut(chain, 0, 0)
    first, step = int(((size - residues) % modulus).min()), modulus // len(residues)
    return Cut(chain, first, step) if size - (first or step) >= 1 else Cut(chain, 0, 0)


class _Layout:
    """Consecutive numbers, from 1, for the rows of all chains."""

    def __init__(self, chains: Sequence[Chain], unit_count: int) -> None:
        sizes = [len(chain.rows) for chain in chains]
        self.starts = np.cumsum([1, *sizes])
        self.sizes = sizes
        self.chain_of = np.concatenate([[-1], np.repeat(np.arange(len(sizes)), sizes)])
        self.row_of = np.zeros(unit_count + 1, dtype=np.int64)
        for start, chain in zip(self.starts, chains, strict=False):
            self.row_of[chain.rows] = start + np.arange(len(chain.rows))[:, None]

    def rows(self, label: Label) -> tuple[Ints, Ints]:
        """Rows at every position, ascending and without repetition, and how many they are."""
        rows = np.sort(self.row_of[label], axis=1)
        rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = 0
        rows = np.sort(rows, axis=1)
        return rows, (rows > 0).sum(axis=1)


def _split(
    chains: Sequence[Chain], labels: Sequence[tuple[Label, int]], unit_count: int, modulus: int
) -> list[Chain]:
    """Part the chains so that the rows of each fill equally many positions of every dim."""
    layout = _Layout(chains, unit_count)
    marks: list[list[Ints]] = [[] for _ in chains]
    for label, weight in labels:
        rows, several = layout.rows(label)
        lone = np.bincount(rows[several == 1].max(axis=1, initial=0), minlength=layout.starts[-1])
        shared = np.bincount(rows[several > 1].ravel(), minlength=layout.starts[-1])
        present = np.unique(layout.chain_of[np.unique(rows)])
        for n in present[present >= 0].tolist():
            own = slice(layout.starts[n], layout.starts[n + 1])
            for counts in (lone[own] * weight % modulus, shared[own]):
                if counts.min() != counts.max():
                    marks[n].append(counts)
    parted: list[Chain] = []
    for chain, columns in zip(chains, marks, strict=True):
        if not columns:
            parted.append(chain)
            continue
        _, which = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        for index in range(int(which.max()) + 1):
            rows = chain.rows[which.ravel() == index]
            parted.append(Chain(rows, rows.size))
    return parted


def _measure(label: Label, weight: int, layout: _Layout, modulus: int) -> _Dim:
    """The width of a dim whose positions count ``weight`` times."""
    rows, several = layout.rows(label)
    dim = _Dim(weight * int((several == 0).sum()), {}, [], set())
    lone = rows[several == 1].max(axis=1, initial=0)
    counts = np.bincount(lone, minlength=layout.starts[-1])
    for n in np.unique(layout.chain_of[lone]).tolist():
        own = counts[layout.starts[n] : layout.starts[n + 1]]
        dim.lone[n] = weight * int(own[0]) % modulus, weight * int(own.sum())
    crossing = rows[several > 1]
    if not len(crossing):
        return dim
    patterns, which = np.unique(layout.chain_of[crossing], axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns.tolist()):
        chains = tuple(n for n in pattern if n >= 0)
        cells = crossing[which.ravel() == index][:, [n >= 0 for n in pattern]]
        sizes = [layout.sizes[n] for n in chains]
        if len(set(chains)) == len(chains):
            code = np.zeros(len(cells), dtype=np.int64)
            for column, n in zip(cells.T, chains, strict=True):
                code = code * layout.sizes[n] + (column - layout.starts[n])
            _, times = np.unique(code, return_counts=True)
            if len(times) == prod(sizes) and times.min() == times.max():
                dim.products.append((chains, weight * int(times[0])))
                continue
        dim.ragged |= set(chains)
    return dim


def _without(dim: _Dim, sizes: Sequence[int], frozen: set[int]) -> _Dim:
    """The dim once the frozen chains count as fixed."""
    thawed = _Dim(dim.fixed, {}, [], set())
    for n, (times, total) in dim.lone.items():
        if n in frozen:
            thawed.fixed += total
        else:
            thawed.lone[n] = times, total
    for chains, times in dim.products:
        live = tuple(n for n in chains if n not in frozen)
        times *= prod(sizes[n] for n in chains if n in frozen)
        if len(live) > 1:
            thawed.products.append((live, times))
        elif live:
            known = thawed.lone.get(live[0], (0, 0))
            thawed.lone[live[0]] = known[0] + times, known[1] + times * sizes[live[0]]
        else:
            thawed.fixed += times
    return thawed


def _residues(
    dims: Sequence[_Dim], sizes: Sequence[int], modulus: int, frozen: set[int]
) -> tuple[NDArray[np.bool_], set[int]]:
    """For every chain the lengths, modulo ``modulus``, that align its dims; who can't align.

    On a dim of one chain the fixed positions count along; on any other all summands are aligned
    one by one, a product through that of its factors which has the most rows.
    """
    lengths = np.arange(modulus)
    allowed = np.ones((len(sizes), modulus), dtype=np.bool_)
    stuck: set[int] = set()
    live = [_without(dim, sizes, frozen) for dim in dims]
    for dim in live:
        if len(dim.lone) == 1 and not dim.products:
            ((n, (times, _)),) = dim.lone.items()
            allowed[n] &= (times * lengths + dim.fixed) % modulus == 0
            continue
        if dim.fixed % modulus:
            stuck |= _chains_on(dim)
        for n, (times, _) in dim.lone.items():
            allowed[n] &= times * lengths % modulus == 0
    for chains, times in (product for dim in live for product in dim.products):
        if not _align_product(chains, times, allowed, sizes):
            stuck |= set(chains)
    return allowed, stuck


def _align_product(
    chains: tuple[int, ...], times: int, allowed: NDArray[np.bool_], sizes: Sequence[int]
) -> bool:
    """Let the longest chain that can align a product of lengths; False where none can."""
    modulus = allowed.shape[1]
    sure = {n: gcd(modulus, *np.flatnonzero(allowed[n]).tolist()) for n in chains}
    if times * prod(sure.values()) % modulus == 0:
        return True
    for n in sorted(chains, key=lambda n: (-sizes[n], n)):
        others = prod(sure[m] for m in chains if m != n)
        need = modulus // gcd(modulus, times * others)
        if sizes[n] > need:
            allowed[n] &= np.arange(modulus) % need == 0
            return True
    return False


def _chains_on(dim: _Dim) -> set[int]:
    return set(dim.lone).union(*(chains for chains, _ in dim.products))


def _join(cuts: dict[int, Cut], dims: Sequence[_Dim], frozen: set[int]) -> tuple[Cut, ...]:
    """Let chains that share a dim which isn't aligned yet begin with one common quantum."""
    a: list[int] = []
    b: list[int] = []
    for dim in dims:
        chains = sorted(_chains_on(dim) - frozen)
        if len(chains) > 1 and any(cuts[n].first for n in chains):
            a += chains[:1] * (len(chains) - 1)
            b += chains[1:]
    size = len(cuts)
    edges = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(size, size))
    component = connected_components(edges, directed=False)[1].tolist() if size else []
    tied = set(a) | set(b)
    return tuple(
        Cut(cut.chain, cut.first, cut.step, component[n] if n in tied else -1)
        for n, cut in sorted(cuts.items())
    )
