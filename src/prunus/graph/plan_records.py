"""What a plan consists of: costs, edits, choices in groups; how they print and are renamed."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from prunus.errors import PlanError, first_names

Named = TypeVar("Named", "Edit", "Scaling", "GroupChoice")
Value = TypeVar("Value")

CLASS = "__class__"
"""The attribute under which a plan notes that a module changes to its equivalent."""

_PATH = re.compile(r"[^\W\d_]\w*(\.[^_.\[\]][^.\[\]]*|\[\d{1,9}\])*")
"""``name``, ``name.key``, ``name[1]``: names that begin with an underscore are nobody else's."""


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
class Edit:
    """A Python attribute that follows its axis; sequences are kept as tuples.

    >>> Edit("layer1.norm", "normalized_shape", [64], [48]).after
    (48,)
    """

    module: str
    attribute: str
    before: Any
    after: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", freeze(self.before))
        object.__setattr__(self, "after", freeze(self.after))


@dataclass(frozen=True, slots=True)
class Scaling:
    """Positions of one axis of the original that are multiplied by a factor before they are cut."""

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: float


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """What goes from one group: ascending indices into its units, not unit ids."""

    name: str
    size: int
    removed: tuple[int, ...]


def freeze(value: Any) -> Any:
    """A JSON value with tuples for lists; :class:`~prunus.errors.PlanError` for any other value.

    >>> freeze({"a": [1, [2.5, None]]})
    {'a': (1, (2.5, None))}
    """
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping) and set(map(type, value)) <= {str}:
        return {key: freeze(item) for key, item in value.items()}
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, (bool, int, str, NoneType)):
        return plain
    if isinstance(plain, float) and math.isfinite(plain):
        return plain
    raise PlanError(
        f"{value!r} can't be part of a plan",
        why="a plan is JSON: null, booleans, finite numbers, strings, lists, and objects of these",
    )


def kind_of_edit(attribute: str, before: Any, after: Any) -> str | None:
    """Which of the changes that a plan may make to an attribute this is; None if it is none.

    >>> kind_of_edit("out_features", 8, 5), kind_of_edit("sizes", (8, 3), (5, 3))
    ('integer', 'integers')
    >>> kind_of_edit("config.layer_types", ("full", "local", "full"), ("full", "full"))
    'subsequence'
    >>> kind_of_edit("training", True, False) is kind_of_edit("width", 8, 9) is None
    True
    """
    if attribute in (CLASS, "use_nested_tensor"):
        return "adapter" if _adapts(attribute, before, after) else None
    if not _PATH.fullmatch(attribute) or type(before) is not type(after):
        return None
    if type(before) is int:
        return "integer" if 0 < after <= before else None
    return _kind_of_lists(before, after) if type(before) is tuple else None


def _adapts(attribute: str, before: Any, after: Any) -> bool:
    if attribute == CLASS:
        return _is_equivalent(after) and (type(before) is str or _is_equivalent(before))
    return before is True and after is False  # of PyTorch's encoder, whose layers change class


def _kind_of_lists(before: tuple[Any, ...], after: tuple[Any, ...]) -> str | None:
    kinds = {type(item) for item in (*before, *after)}
    if len(before) == len(after):
        smaller = kinds <= {int} and all(map(_is_smaller, before, after))
        return "integers" if smaller else None
    rest = iter(before)
    kept = after and kinds <= {int, str, NoneType} and all(item in rest for item in after)
    return "subsequence" if kept else None


def _is_smaller(before: int, after: int) -> bool:
    return before == after or 0 < after <= before


def _is_equivalent(value: Any) -> bool:
    """A class of our own table with the positive factor that it keeps."""
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and type(value[0]) is str and type(value[1]) is float and 0 < value[1] < math.inf


def check_kind(where: str, attribute: str, before: Any, after: Any) -> None:
    """:class:`~prunus.errors.PlanError` for what is none of the edits that a plan may make."""
    if kind_of_edit(attribute, before, after) is None:
        raise PlanError(
            "a plan may not change that",
            where=where,
            why=f"{attribute!r} is not changed in a way that a plan may: integers of a module or "
            "its config become smaller and stay positive, lists lose entries",
            fix="plan anew",
        )


_SHOWN = 20
"""Groups that a table lists before it only counts them."""

_FIRST = ("params", "macs", "bytes")
_NAMES = {"macs": "MACs"}


def costs_lines(costs: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """One line for each cost: before, after, and the share that is left."""
    order = [*(n for n in _FIRST if n in costs), *sorted(set(costs) - set(_FIRST))]
    rows = [
        (_NAMES.get(name, name), *map(spell_count, costs[name]), f"{Cost(*costs[name]).share:.0%}")
        for name in order
    ]
    if rows:
        yield from _aligned([("", "before", "after", "share"), *rows])


def groups_lines(groups: Sequence[tuple[str, int, int]]) -> Iterator[str]:
    """One line for each group: its name, its units, and how many of them are kept."""
    rows = [(name, str(size), str(kept), f"{kept / max(size, 1):.0%}")
            for name, size, kept in groups[:_SHOWN]]  # fmt: skip
    if rows:
        yield from _aligned([("group", "units", "kept", "share"), *rows])
    if len(groups) > _SHOWN:
        yield f"… and {len(groups) - _SHOWN} more groups"


def spell_count(number: int) -> str:
    """A number in three or four digits.

    >>> [spell_count(n) for n in (999, 41_886, 173_842, 25_557_032, 6_700_000_000)]
    ['999', '41.9 k', '174 k', '25.6 M', '6.70 G']
    """
    scaled, suffixes = float(number), iter(("", " k", " M", " G", " T", " P"))
    suffix = next(suffixes)
    while scaled >= 999.5 and suffix != " P":
        scaled, suffix = scaled / 1000, next(suffixes)
    if not suffix:
        return str(number)
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def _aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *numbers])


class Renaming:
    """What everything is called once the modules of the given paths are gone.

    Children that are called by their place close up, as those of a list do; others keep their
    names.

    Examples
    --------
    >>> names = Renaming(["layers.1", "layers.2"])
    >>> names.after("layers.3.weight"), names.after("layers.2.weight"), names.after("head.weight")
    ('layers.1.weight', None, 'head.weight')
    >>> names.before("layers.1.weight")
    'layers.3.weight'
    """

    def __init__(self, dropped: Iterable[str]) -> None:
        self._gone: dict[str, set[str]] = {}
        for name in dropped:
            container, _, key = name.rpartition(".")
            self._gone.setdefault(container, set()).add(key)
        self._places = {
            container: sorted(int(key) for key in keys if _is_place(key))
            for container, keys in self._gone.items()
        }

    def after(self, name: str) -> str | None:
        """The later name of what was called so; None for what is gone."""
        old: list[str] = []
        new: list[str] = []
        for part in name.split("."):
            container = ".".join(old)
            if part in self._gone.get(container, ()):
                return None
            old.append(part)
            places = self._places.get(container)
            if places and _is_place(part):
                part = str(int(part) - bisect_left(places, int(part)))
            new.append(part)
        return ".".join(new)

    def left_of(self, entries: Mapping[str, Value]) -> dict[str, Value]:
        """The entries that are not gone, under their later names."""
        later = ((self.after(name), value) for name, value in entries.items())
        return {name: value for name, value in later if name is not None}

    def before(self, name: str) -> str:
        """The name that was, of what is called so now."""
        old: list[str] = []
        for part in name.split("."):
            places = self._places.get(".".join(old))
            if places and _is_place(part):
                index = int(part)
                for place in places:
                    index += place <= index
                part = str(index)
            old.append(part)
        return ".".join(old)


def _is_place(key: str) -> bool:
    """Whether a child is called by a number; those of more digits are names like any other."""
    return len(key) < 10 and key.isdecimal()


def check_follows(
    first: Mapping[str, Any], second: Mapping[str, Any], written: Container[str]
) -> None:
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    names = [name for name in names if name not in written]
    if names:
        differences = [
            f"{n}: {first.get(n, 'nothing')} and {second.get(n, 'nothing')}" for n in names
        ]
        raise PlanError(
            "the later plan is not for the model that this one leaves",
            why=f"the shapes differ: {first_names(differences)}",
            fix="apply this plan, trace the result, and plan on that",
        )


def renamed(records: Sequence[Named], field: str, names: Renaming) -> tuple[Named, ...]:
    """The records of what is not gone, under its later name."""
    found = []
    for record in records:
        later: dict[str, Any] = {field: names.after(getattr(record, field))}
        if later[field] is not None:
            found.append(replace(record, **later))
    return tuple(found)


def merge_edits(first: Sequence[Edit], second: Sequence[Edit]) -> tuple[Edit, ...]:
    merged = {(edit.module, edit.attribute): edit for edit in first}
    for edit in second:
        key = edit.module, edit.attribute
        merged[key] = replace(edit, before=merged.get(key, edit).before)
    return tuple(edit for edit in merged.values() if edit.before != edit.after)


def merge_groups(
    first: Sequence[GroupChoice], second: Sequence[GroupChoice]
) -> tuple[GroupChoice, ...]:
    merged = {choice.name: choice for choice in first}
    for choice in second:
        known = merged.get(choice.name)
        if known is None:
            merged[choice.name] = choice
            continue
        stay = np.setdiff1d(np.arange(known.size), known.removed)
        if len(stay) == choice.size:
            gone = {*known.removed, *stay[list(choice.removed)].tolist()}
            merged[choice.name] = GroupChoice(choice.name, known.size, tuple(sorted(gone)))
    return tuple(merged.values())
