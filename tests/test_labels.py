"""The axis algebra is sound: what was demanded of labels holds for every choice of units.

Random demands are played on an algebra; then atoms are kept or not at random, and every demand is
checked against the plain meaning of a label: a position stays if and only if all its atoms do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from prunus.graph.axis import Label
from prunus.graph.groups import Pin
from prunus.tracer import labels as labels_module
from prunus.tracer.labels import MAX_FACTORS, Algebra

WHY = Pin("", "", "", "")
Keep = NDArray[np.bool_]


def keep(algebra: Algebra, label: Label | None, size: int, kept: Keep) -> Keep:
    """Which positions of a dim stay."""
    flat = algebra.canonical(label)
    return np.ones(size, dtype=np.bool_) if flat is None else kept[flat].all(axis=1)


def conditions(label: Label | None) -> list[set[int]]:
    """Per position, the atoms that have to stay."""
    return [] if label is None else [{*row} - {0} for row in label.tolist()]


@dataclass(frozen=True, eq=False)
class Dim:
    """A dim in play."""

    label: Label | None
    size: int


@dataclass
class Game:
    """An algebra, the dims in play, and what was demanded of them."""

    algebra: Algebra
    dims: list[Dim] = field(default_factory=list)
    equal: list[tuple[Dim, Dim]] = field(default_factory=list)
    pinned: list[Dim] = field(default_factory=list)
    viewed: list[tuple[Dim, Dim, Dim]] = field(default_factory=list)
    joined: list[tuple[Dim, list[Dim]]] = field(default_factory=list)

    def play(self, move: str, a: int, b: int) -> None:
        """One move; ``a`` and ``b`` choose among what is possible."""
        algebra = self.algebra
        if move == "fresh" or not self.dims:
            size = (2, 3, 4, 6, 12)[a % 5]
            self.dims.append(Dim(algebra.fresh(size)[:, None], size))
            return
        first = self.dims[a % len(self.dims)]
        if move == "unify":
            alike = [dim for dim in self.dims if dim.size == first.size]
            self._unify(first, alike[b % len(alike)])
        elif move == "pin":
            algebra.pin(first.label, WHY)
            self.pinned.append(first)
        elif move == "pin part" and first.label is not None:
            part = Dim(first.label[: b % first.size], b % first.size)
            algebra.pin(part.label, WHY)
            self.pinned.append(part)
        elif move == "split":
            rows = [n for n in range(1, first.size + 1) if first.size % n == 0]
            sizes = (rows[b % len(rows)], first.size // rows[b % len(rows)])
            parts = algebra.split(first.label, sizes, WHY)
            row, column = (Dim(label, size) for label, size in zip(parts, sizes, strict=True))
            self.dims += [row, column]
            self.viewed.append((first, row, column))
        elif move == "merge":
            small = [dim for dim in self.dims if dim.size * first.size <= 24]
            if small:
                second = small[b % len(small)]
                pair = (first.label, second.label)
                label = algebra.merge(pair, (first.size, second.size))
                self.dims.append(Dim(label, first.size * second.size))
                self.viewed.append((self.dims[-1], first, second))
        elif move == "cat":
            parts = [first, self.dims[b % len(self.dims)], Dim(None, 1)][: 2 + b % 2]
            sizes = [part.size for part in parts]
            if sum(sizes) <= 24:
                label = algebra.cat([part.label for part in parts], sizes)
                self.dims.append(Dim(label, sum(sizes)))
                self.joined.append((self.dims[-1], parts))
        elif move == "reorder" and first.label is not None:
            order = np.random.default_rng(b).permutation(first.size)
            self.dims.append(Dim(first.label[order], first.size))
        elif move == "slice" and first.label is not None:
            size = 1 + b % first.size
            self.dims.append(Dim(first.label[:size], size))
        elif move == "fix":
            self._unify(first, Dim(None, first.size))

    def _unify(self, first: Dim, second: Dim) -> None:
        label = self.algebra.unify(first.label, second.label, WHY)
        self.equal += [(first, second), (first, Dim(label, first.size))]

    def violations(self, kept: Keep) -> Iterator[str]:
        """Demands that do not hold once these atoms are kept."""

        def stay(dim: Dim) -> Keep:
            return keep(self.algebra, dim.label, dim.size, kept)

        for a, b in self.equal:
            if not np.array_equal(stay(a), stay(b)):
                yield "two dims that were tied keep different positions"
        for dim in self.pinned:
            if not stay(dim).all():
                yield "a pinned position is gone"
        for flat, row, column in self.viewed:
            if not np.array_equal(
                stay(flat), np.logical_and.outer(stay(row), stay(column)).ravel()
            ):
                yield "a viewed dim keeps something else than the product of its parts"
        for whole, parts in self.joined:
            if not np.array_equal(stay(whole), np.concatenate([stay(part) for part in parts])):
                yield "a concatenation keeps something else than its parts"


MOVES = ("fresh", "unify", "split", "merge", "cat", "reorder", "slice", "pin part", "pin", "fix")
Moves = Sequence[tuple[str, int, int]]


def faults(algebra: Algebra, moves: Moves, seed: int = 0) -> list[str]:
    """Everything that is wrong after the moves, under a few random choices of atoms."""
    game = Game(algebra)
    for move, a, b in moves:
        game.play(move, a, b)
    for dim in game.dims:
        algebra.canonical(dim.label)  # may pin what grew too deep
    found = []
    rng = np.random.default_rng(seed)
    for share in (0.9, 0.5, 0.2):
        kept = rng.random(algebra.count) < share
        kept[0] = True
        found += list(game.violations(kept))
    for dim in game.dims:
        flat = algebra.canonical(dim.label)
        if flat is not None and flat.shape[1] > MAX_FACTORS:
            found.append("a label has more factors than it may")
        if conditions(flat) != conditions(algebra.canonical(flat)):
            found.append("resolving a resolved label changes it")
    return found


moves_strategy = st.lists(
    st.tuples(st.sampled_from(MOVES), st.integers(0, 30), st.integers(0, 30)), max_size=25
)


@given(moves_strategy, st.integers(0, 5))
def test_every_demand_holds(moves: Moves, seed: int) -> None:
    assert faults(Algebra(), moves, seed) == []


def random_moves(seed: int, count: int = 20) -> list[tuple[str, int, int]]:
    rng = np.random.default_rng(seed)
    common = MOVES[:7]  # those that pin leave less to go wrong
    return [
        (str(rng.choice(common)), int(rng.integers(30)), int(rng.integers(30)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_every_demand_holds_in_long_games(seed: int) -> None:
    assert faults(Algebra(), random_moves(seed, count=40)) == []


class ForgetsAFactor(Algebra):
    def _define(self, atoms, factors) -> None:
        super()._define(atoms, [factors[0], np.zeros_like(factors[0])])


class TiesAllButOne(Algebra):
    def _tie(self, a, b) -> None:
        super()._tie(a[1:], b[1:])


class ShiftsAConcatenation(Algebra):
    def cat(self, labels, sizes):
        return super().cat(labels[::-1], sizes[::-1])


class TilesTheWrongWay(Algebra):
    def merge(self, labels, sizes):
        return super().merge(labels[::-1], sizes[::-1])


class PinsNothing(Algebra):
    def pin(self, label, why) -> None:
        pass


@pytest.mark.parametrize(
    "faulty", [ForgetsAFactor, TiesAllButOne, ShiftsAConcatenation, TilesTheWrongWay, PinsNothing]
)
def test_a_faulty_algebra_is_found_out(faulty: type[Algebra]) -> None:
    assert any(faults(faulty(), random_moves(seed)) for seed in range(40))


def test_games_leave_something_to_prune() -> None:
    """Soundness alone is cheap: an algebra that pins everything is sound."""
    free = total = 0
    for seed in range(40):
        game = Game(Algebra())
        for move in random_moves(seed, count=12):
            game.play(*move)
        resolved = [game.algebra.canonical(dim.label) for dim in game.dims]
        free += sum(label is not None for label in resolved)
        total += len(resolved)
    assert free > total / 2


def test_heads_and_dims() -> None:
    algebra = Algebra()
    channels = algebra.fresh(12)[:, None]
    heads, dims = algebra.split(channels, (3, 4), WHY)
    assert heads is not None
    assert dims is not None
    kept = np.ones(algebra.count, dtype=np.bool_)
    kept[heads[1]] = False
    kept[dims[0]] = False
    assert np.flatnonzero(keep(algebra, channels, 12, kept)).tolist() == [1, 2, 3, 9, 10, 11]


def test_viewing_twice_names_the_same_parts() -> None:
    algebra = Algebra()
    channels = algebra.fresh(12)[:, None]
    first = algebra.split(channels, (3, 4), WHY)
    second = algebra.split(channels, (3, 4), WHY)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_repeated_atoms_are_rows() -> None:
    """49 flattened columns of a channel are one atom, and come apart as such."""
    algebra = Algebra()
    channels = algebra.fresh(4)[:, None]
    flat = algebra.merge([channels, None], (4, 49))
    rows, columns = algebra.split(flat, (4, 49), WHY)
    assert rows is not None
    assert np.array_equal(rows, channels)
    assert columns is None


def test_cat_of_different_widths() -> None:
    algebra = Algebra()
    one = algebra.fresh(2)[:, None]
    product = algebra.merge([algebra.fresh(2)[:, None], algebra.fresh(3)[:, None]], (2, 3))
    assert product is not None
    label = algebra.cat([one, product, None], (2, 6, 1))
    assert label is not None
    assert label.shape == (9, 2)
    kept = np.ones(algebra.count, dtype=np.bool_)
    kept[one[1]] = False
    kept[product[0, 0]] = False  # the first row of two
    assert np.flatnonzero(keep(algebra, label, 9, kept)).tolist() == [0, 5, 6, 7, 8]


def test_unit_zero_always_wins() -> None:
    algebra = Algebra()
    label = algebra.fresh(3)[:, None]
    algebra.unify(label, None, WHY)
    assert algebra.canonical(label) is None


def test_occurs_check() -> None:
    """A dim can't be a product of which it is a factor itself: everything involved is pinned."""
    algebra = Algebra()
    rows, columns = algebra.fresh(2)[:, None], algebra.fresh(2)[:, None]
    square = algebra.merge([rows, columns], (2, 2))
    whole = algebra.cat([rows, algebra.fresh(2)[:, None]], (2, 2))
    algebra.unify(whole, square, WHY)
    for label in (rows, columns, square, whole):
        assert algebra.canonical(label) is None


def test_a_shuffle_of_itself_stays_sound() -> None:
    algebra = Algebra()
    channels = algebra.fresh(6)[:, None]
    rows, columns = algebra.split(channels, (2, 3), WHY)
    algebra.unify(channels, algebra.merge([columns, rows], (3, 2)), WHY)
    kept = np.random.default_rng(0).random(algebra.count) < 0.5
    kept[0] = True
    product = np.logical_and.outer(keep(algebra, rows, 2, kept), keep(algebra, columns, 3, kept))
    assert np.array_equal(keep(algebra, channels, 6, kept), product.ravel())


def test_more_factors_than_allowed_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "MAX_FACTORS", 3)
    algebra = Algebra()
    dims = [algebra.fresh(2)[:, None] for _ in range(4)]
    three = algebra.merge(dims[:3], (2, 2, 2))
    assert algebra.canonical(three) is not None
    four = algebra.merge(dims, (2, 2, 2, 2))
    assert algebra.canonical(four) is None
    assert algebra.canonical(three) is None
    assert "factors" in algebra.events[-1].why.reason


def test_every_tie_and_pin_is_remembered() -> None:
    algebra = Algebra()
    a, b = algebra.fresh(3)[:, None], algebra.fresh(3)[:, None]
    why = Pin("tied", "add", "block", "file.py:1")
    algebra.unify(a, b, why)
    algebra.pin(a, why)
    assert [event.why for event in algebra.events] == [why, why]
    assert algebra.events[0].b is not None
    assert algebra.events[1].b is None
