"""Rounding: of which numbers the cut dims are multiples, and how many units go at once for that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm, prod
from typing import Any

import numpy as np
from networkx.utils import UnionFind
from numpy.typing import NDArray

from prunus.graph.axis import Axis, Label, Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Aligned, Group
from prunus.graph.program import Ref
from prunus.planner.chains import Chain
from prunus.planner.cost import takers_of
from prunus.planner.filters import spread
from prunus.planner.option_values import check_count, check_each
from prunus.tracer.dataflow import Dataflow, name_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WIDE = 32
"""Narrower widths are not rounded unless somebody asks for it."""

KINDS = ("conv", "linear", "*")
"""Keys of ``round_to`` that are no globs: kinds of layers, and all the others."""

FINEST = 16
"""A multiple that is too coarse for a narrow group is halved, but not below this."""


@dataclass(frozen=True)
class Default:
    """Multiples where nobody asked for any, by names of groups; others are not rounded.

    Only what is made has to be a multiple, in widths of 32 and more: an input that is read beside
    what a group makes, three channels of an image say, keeps no group from being cut.
    """

    multiples: Mapping[str, int]

    def __str__(self) -> str:
        return f"{max(self.multiples.values())} by default" if self.multiples else "1"


RoundTo = int | Mapping[str, int] | Default
"""One number for all, or numbers by kind of layer (``"linear"``, ``"conv"``) and by glob."""


def aligned_labels(
    graph: CouplingGraph, untouched: Mapping[str, str], round_to: RoundTo
) -> list[tuple[Label, int]]:
    """Labels that have to be multiples, and of what: where kernels demand it or it pays.

    It pays on both sides of contractions.  A group that is on none is aligned on whatever carries
    it.  Carriers beside a contraction follow it, or (a bias table per head) don't matter.

    Parameters
    ----------
    untouched
        Names of groups that are kept as they are.
    round_to
        Globs decide before kinds of layers, and these before ``"*"``.  A group narrower than
        twice the number (its width on its widest producing axis, heads × dim counting as one) is
        rounded to half of it, and so on, down to 16: 32 is for groups at least 64 wide.
    """
    found = [(c.label, c.multiple) for c in graph.constraints if isinstance(c, Aligned)]
    live = [group for group in graph.groups if group.name not in untouched]
    if isinstance(round_to, Default):
        return [*found, *_default_labels(graph, live, round_to.multiples)]
    return [*found, *_asked_labels(graph, live, round_to)]


def _asked_labels(
    graph: CouplingGraph, live: Sequence[Group], round_to: int | Mapping[str, int]
) -> list[tuple[Label, int]]:
    """Axes of contractions, with the least common multiple of what their groups are asked for."""
    asked = _asked_of(graph, round_to)
    widths = _widths(graph)
    found: dict[tuple[Any, bytes], tuple[Label, int]] = {}
    for group in live if round_to != 1 else ():
        contracted = [axis for axis, role in group.axes if role is not Role.CARRIER]
        for axis in contracted or [axis for axis, _ in group.axes]:
            label = graph.labels[axis]
            multiple = _halved(asked(group, axis), int(widths[label[label > 0]].min()))
            key = (label.shape, label.tobytes())
            found[key] = label, lcm(found.get(key, (label, 1))[1], multiple)
    return [pair for pair in found.values() if pair[1] > 1]


def _asked_of(
    graph: CouplingGraph, round_to: int | Mapping[str, int]
) -> Callable[[Group, Axis], int]:
    """What is asked of an axis of a group."""
    check_each("round_to", round_to, check_count)
    asked = round_to if isinstance(round_to, Mapping) else {"*": round_to}
    globs = {key: value for key, value in asked.items() if key not in KINDS}
    by_glob = spread(graph, globs, "round_to", check_count)
    convolved = _convolved(graph) if asked.keys() & {"conv", "linear"} else frozenset()

    def multiple(group: Group, axis: Axis) -> int:
        kind = "conv" if axis.tensor in convolved else "linear"
        found: int = by_glob.get(group.name, asked.get(kind, asked.get("*", 1)))
        return found

    return multiple


def _halved(multiple: int, width: int) -> int:
    """A multiple that is not too coarse for a width.

    >>> _halved(32, 64), _halved(32, 63), _halved(32, 8)
    (32, 16, 16)
    """
    while multiple % 2 == 0 and multiple // 2 >= FINEST and width < 2 * multiple:
        multiple //= 2
    return multiple


def _default_labels(
    graph: CouplingGraph, live: Sequence[Group], multiples: Mapping[str, int]
) -> Iterator[tuple[Label, int]]:
    """Units of every wide group, and wide axes that several groups make together, side by side or
    as blocks times what is in each.
    """
    of_unit = np.zeros(graph.unit_count + 1, dtype=np.int64)  # 0 for those that are kept
    for group in live:
        of_unit[group.units] = multiple = multiples.get(group.name, 1)
        if multiple > 1 and group.size >= WIDE:
            yield group.units[:, None], multiple
    seen: set[bytes] = set()
    for group in graph.groups:
        for axis in (axis for axis, role in group.axes if role is Role.PRODUCER):
            label = graph.labels[axis]
            multiple = _made_together(label, group, of_unit)
            if multiple > 1 and label.tobytes() not in seen:
                seen.add(label.tobytes())
                yield label, multiple


def _made_together(label: Label, group: Group, of_unit: Ints) -> int:
    """Of what a wide axis of several groups is a multiple for certain once these are; else 1."""
    units = label[of_unit[label] > 0]
    if len(label) < WIDE or not len(np.setdiff1d(units, group.units)):
        return 1
    multiple = int(of_unit[units].min())
    fixed = int((of_unit[label] == 0).all(axis=1).sum())
    return 1 if fixed % multiple else multiple


def wide_groups(graph: CouplingGraph, names: Collection[str]) -> list[str]:
    """Those of 32 units and more, or that make an axis of 32 and more together with others."""
    widths = _widths(graph)
    return [
        group.name
        for group in graph.groups
        if group.name in names and (group.size >= WIDE or widths[group.units].max() >= WIDE)
    ]


def _widths(graph: CouplingGraph) -> Ints:
    """For every unit the width of its group: the size of its widest producing axis."""
    widths = np.zeros(graph.unit_count + 1, dtype=np.int64)
    for group in graph.groups:
        makers = [axis for axis, role in group.axes if role is Role.PRODUCER]
        sizes = [len(graph.labels[axis]) for axis in makers or [axis for axis, _ in group.axes]]
        widths[group.units] = max(sizes)
    return widths


def _convolved(graph: CouplingGraph) -> frozenset[str]:
    """Tensors of which the weights of convolutions are made; without a program, those of 3 dims."""
    if graph.program is None:
        return frozenset(a.tensor for a in graph.labels if len(graph.shapes[a.tensor]) > 2)
    flow = Dataflow(graph.program)
    found: set[int] = set()
    for node in graph.program.nodes:
        weight = node.args.get("weight") if "conv" in name_of(node) else None
        if isinstance(weight, Ref) and weight.value in flow.fixed:
            found.update(flow.state_behind(weight.value))
    return frozenset(graph.program.state[value] for value in found)


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain in quanta: ``first`` rows (if any) before all others, then ``step`` rows at a time.

    ``step`` is 0 for a chain that is kept as it is.  Cuts with the same ``joint`` ≥ 0 share
    their first quantum, since they share a dim that is aligned only when all of it is gone.
    """

    chain: Chain
    first: int
    step: int
    joint: int = -1


@dataclass(eq=False, slots=True)
class _Dim:
    """Width of a dim, modulo the modulus: ``fixed`` + Σ times · product of the lengths of chains.

    A position may count several times.  Rows of ``ragged`` chains cross without a full grid.
    """

    fixed: int
    terms: dict[tuple[int, ...], int] = field(default_factory=dict)
    ragged: set[int] = field(default_factory=set)

    @property
    def chains(self) -> set[int]:
        """Numbers of the chains on it."""
        return set().union(*self.terms)


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
    layout = _Layout(_split(_Layout(chains, unit_count), weighted, modulus), unit_count)
    dims = [_measure(label, weight, layout, modulus) for label, weight in weighted]
    cuts = _settle(layout, dims, modulus)
    moving = {n for n, cut in enumerate(cuts) if cut.step}
    return _join(cuts, [dim.chains & moving for dim in dims])


def _settle(layout: _Layout, dims: Sequence[_Dim], modulus: int) -> list[Cut]:
    """The cuts of all chains; those that can't be cut are kept, until the others can."""
    frozen: set[int] = set().union(*(dim.ragged for dim in dims))
    while True:
        allowed, stuck = _residues(dims, layout.sizes, modulus, frozen)
        cuts = [
            Cut(chain, 0, 0) if n in frozen else _cut(chain, allowed[n])
            for n, chain in enumerate(layout.chains)
        ]
        stuck |= {n for n, cut in enumerate(cuts) if not cut.step} - frozen
        if not stuck:
            return cuts
        frozen |= stuck


def _cut(chain: Chain, allowed: Bools) -> Cut:
    """The cut of a chain whose length may be these residues; step 0 where none is possible."""
    size, modulus, residues = len(chain.rows), len(allowed), np.flatnonzero(allowed)
    if not len(residues):
        return Cut(chain, 0, 0)
    first, step = int(((size - residues) % modulus).min()), modulus // len(residues)
    return Cut(chain, first, step) if size - (first or step) >= 1 else Cut(chain, 0, 0)


class _Layout:
    """Consecutive numbers, from 1, for the rows of all chains."""

    def __init__(self, chains: Sequence[Chain], unit_count: int) -> None:
        self.chains = chains
        self.sizes = [len(chain.rows) for chain in chains]
        self.starts = np.cumsum([1, *self.sizes])
        self.chain_of = np.concatenate([[-1], np.repeat(np.arange(len(chains)), self.sizes)])
        self.row_of = np.zeros(unit_count + 1, dtype=np.int64)
        for start, chain in zip(self.starts, chains, strict=False):
            self.row_of[chain.rows] = start + np.arange(len(chain.rows))[:, None]


def _split(layout: _Layout, labels: Sequence[tuple[Label, int]], modulus: int) -> list[Chain]:
    """Part the chains so that the rows of each fill equally many positions of every dim."""
    marks: list[list[Ints]] = [[] for _ in layout.chains]
    for label, weight in labels:
        rows, several = takers_of(label, layout.row_of)
        lone = np.bincount(rows[several == 1].max(axis=1, initial=0), minlength=layout.starts[-1])
        shared = np.bincount(rows[several > 1].ravel(), minlength=layout.starts[-1])
        present = np.unique(layout.chain_of[np.unique(rows)])
        for n in present[present >= 0].tolist():
            own = slice(layout.starts[n], layout.starts[n + 1])
            for counts in (lone[own] * weight % modulus, shared[own]):
                if counts.min() != counts.max():
                    marks[n].append(counts)
    parted: list[Chain] = []
    for chain, columns in zip(layout.chains, marks, strict=True):
        if not columns:
            parted.append(chain)
            continue
        _, which = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        parts = (chain.rows[which.ravel() == index] for index in range(int(which.max()) + 1))
        parted += (Chain(rows, rows.size) for rows in parts)
    return parted


def _measure(label: Label, weight: int, layout: _Layout, modulus: int) -> _Dim:
    """The width of a dim whose positions count ``weight`` times."""
    rows, several = takers_of(label, layout.row_of)
    dim = _Dim(weight * int((several == 0).sum()))
    crossing = rows[several > 0]
    patterns, which = np.unique(layout.chain_of[crossing], axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns.tolist()):
        chains = tuple(n for n in pattern if n >= 0)
        cells = crossing[which.ravel() == index][:, [n >= 0 for n in pattern]]
        sizes = [layout.sizes[n] for n in chains]
        grid = len(set(chains)) == len(chains) and (len(chains) == 1 or len(cells) >= prod(sizes))
        if grid:
            at = tuple((cells - layout.starts[list(chains)]).T)
            times = np.bincount(np.ravel_multi_index(at, sizes), minlength=prod(sizes)) * weight
            grid = len(np.unique(times % modulus)) == 1
            dim.terms[chains] = int(times[0]) % modulus
        if not grid:
            dim.terms.pop(chains, None)
            dim.ragged |= set(chains)
    return dim


def _without(dim: _Dim, sizes: Sequence[int], frozen: set[int]) -> _Dim:
    """The dim once the frozen chains count as fixed."""
    found = _Dim(dim.fixed)
    for chains, times in dim.terms.items():
        live = tuple(n for n in chains if n not in frozen)
        times *= prod(sizes[n] for n in chains if n in frozen)
        if live:
            found.terms[live] = found.terms.get(live, 0) + times
        else:
            found.fixed += times
    return found


def _residues(
    dims: Sequence[_Dim], sizes: Sequence[int], modulus: int, frozen: set[int]
) -> tuple[Bools, set[int]]:
    """For every chain the lengths, modulo ``modulus``, that align its dims; who can't align.

    On a dim of one chain the fixed positions count along; on any other all summands are aligned
    one by one, a product through that of its factors which has the most rows.
    """
    lengths = np.arange(modulus)
    allowed = np.ones((len(sizes), modulus), dtype=np.bool_)
    stuck: set[int] = set()
    products: list[tuple[tuple[int, ...], int]] = []
    for dim in (_without(dim, sizes, frozen) for dim in dims):
        alone = len(dim.terms) == 1 == len(dim.chains)
        if dim.fixed % modulus and not alone:
            stuck |= dim.chains
        for chains, times in dim.terms.items():
            if len(chains) > 1:
                products.append((chains, times))
            else:
                width = times * lengths + (dim.fixed if alone else 0)
                allowed[chains[0]] &= width % modulus == 0
    for chains, times in products:
        if not _align_product(chains, times, allowed, sizes):
            stuck |= set(chains)
    return allowed, stuck


def _align_product(
    chains: tuple[int, ...], times: int, allowed: Bools, sizes: Sequence[int]
) -> bool:
    """Let the longest chain that can align a product; False where none can."""
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


def _join(cuts: Sequence[Cut], dims: Iterable[set[int]]) -> tuple[Cut, ...]:
    """Let chains that share a dim which isn't aligned yet begin with one common quantum."""
    joint: UnionFind[int] = UnionFind()
    tied: set[int] = set()
    for chains in dims:
        if len(chains) > 1 and any(cuts[n].first for n in chains):
            joint.union(*chains)
            tied |= chains
    return tuple(
        Cut(cut.chain, cut.first, cut.step, joint[n] if n in tied else -1)
        for n, cut in enumerate(cuts)
    )
