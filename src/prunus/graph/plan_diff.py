"""What-if: what a plan saves, and what two plans for one model do differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prunus.errors import PlanError
from prunus.graph.plan_json import to_ranges
from prunus.graph.renaming import Renaming


class Cost(NamedTuple):
    """A cost of the dense and of the pruned model.

    >>> Cost(200, 90).share, Cost(200, 90) == (200, 90)
    (0.45, True)
    """

    before: int
    after: int

    @property
    def share(self) -> float:
        """What is left of it, as a fraction; 1 where there was nothing."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """Indices of the units of one group that only one of two plans removes.

    ``size`` is how many units the group has, ``kept`` how many of them *a* and *b* keep.
    """

    name: str
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    size: int
    kept: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """The groups in which two plans differ, the blocks that only one of them drops, and the costs.

    ``costs`` has the costs that both count from the same dense model, of *a* and of *b*.  A
    difference is true if units or blocks differ.

    >>> diff = PlanDiff(
    ...     (GroupDiff("conv1.weight[0]", (1, 2, 3), (7,), 8, (5, 7)),),
    ...     costs={"macs": (Cost(2000, 1250), Cost(2000, 1750))},
    ... )
    >>> print(diff)
    macs: a 1,250 (62.5 %), b 1,750 (87.5 %)
    conv1.weight[0]: a keeps 5 of 8, b 7; only a removes 1–3; only b removes 7
    """

    groups: tuple[GroupDiff, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    costs: Mapping[str, tuple[Cost, Cost]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.groups or self.only_a or self.only_b)

    def __str__(self) -> str:
        if not self:
            return "the plans remove the same units"
        lines = [
            f"{name}: a {a.after:,} ({a.share:.1%}), b {b.after:,} ({b.share:.1%})".replace(
                "%", " %"
            )
            for name, (a, b) in self.costs.items()
        ]
        blocks = (("a", self.only_a), ("b", self.only_b))
        lines += [f"only {side} drops {', '.join(names)}" for side, names in blocks if names]
        for group in self.groups:
            kept = f"a keeps {group.kept[0]} of {group.size}, b {group.kept[1]}"
            sides = (("a", group.only_a), ("b", group.only_b))
            removals = (f"only {side} removes {_spell_units(u)}" for side, u in sides if u)
            lines.append(f"{group.name}: {'; '.join([kept, *removals])}")
        return "\n".join(lines)


def compare(a: Any, b: Any) -> PlanDiff:
    """What two plans for one model do differently; see :meth:`prunus.Plan.diff`."""
    ours, theirs = _shapes_before(a), _shapes_before(b)
    only_a, only_b = _without(a.drops, b.drops), _without(b.drops, a.drops)
    alike = all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    if not alike or (a.drops == b.drops and ours != theirs):
        raise PlanError("these are plans for different models", fix="compare plans of one")
    both = bool(only_a or only_b)
    groups = tuple(_differing(_groups_before(a), _groups_before(b), both=both))
    costs = {name: (cost, b.cost(name)) for name, cost in a.cost().items() if name in b.costs}
    same = {name: pair for name, pair in costs.items() if pair[0].before == pair[1].before}
    return PlanDiff(groups, only_a, only_b, same)


def _without(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, both: bool
) -> Iterator[GroupDiff]:
    """The groups that lose other units; ``both`` leaves out those that only one plan knows."""
    for name in {**ours, **theirs}:
        if both and not (name in ours and name in theirs):
            continue
        a, b = (set(side[name].removed) if name in side else set() for side in (ours, theirs))
        if a != b:
            size = (ours.get(name) or theirs[name]).size
            kept = size - len(a), size - len(b)
            yield GroupDiff(name, tuple(sorted(a - b)), tuple(sorted(b - a)), size, kept)


def _shapes_before(plan: Any) -> dict[str, tuple[int, ...]]:
    """The shapes by the names of the original; those of dropped blocks are not known."""
    names = Renaming(plan.drops)
    own = ((name, shape) for name, shape in plan.shapes.items() if name not in plan.biases)
    return {names.before(name): tuple(shape) for name, shape in own}


def _groups_before(plan: Any) -> dict[str, Any]:
    names = Renaming(plan.drops)
    return {names.before(choice.name): choice for choice in plan.groups}


def _spell_units(indices: Sequence[int]) -> str:
    """Ascending indices as a person writes them.

    >>> _spell_units((0, 1, 2, 5))
    '0–2, 5'
    """
    pairs = to_ranges(indices)
    return ", ".join(str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairs)
