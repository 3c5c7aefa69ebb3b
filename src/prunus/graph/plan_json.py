"""The JSON form of plans: its schema, and a reader that says what is wrong where."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any

import msgspec
import numpy as np

from prunus.errors import PlanError
from prunus.graph.axis import Axis
from prunus.graph.traced import convert, malformed, misplaced, read_traced

Indices = tuple[int, ...]

LIMIT = 1 << 27
"""Positions that a plan may speak of; as ranges they take a few bytes, as numbers gigabytes."""


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


def to_ranges(indices: Sequence[int]) -> list[list[int]]:
    """Ascending indices as [start, stop) ranges.

    >>> to_ranges((0, 1, 2, 5))
    [[0, 3], [5, 6]]
    """
    array = np.asarray(indices, dtype=np.int64)
    if not len(array):
        return []
    breaks = np.flatnonzero(np.diff(array) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(array, breaks)]


VERSION = 2
"""Of the JSON form; version 1 had fewer entries and is read as well."""

READABLE = (1, 2)

CLASS = "__class__"
"""The attribute under which a plan notes that a module changes to its equivalent."""

_PATH = re.compile(r"[^\W\d_]\w*(\.[^_.\[\]][^.\[\]]*|\[\d{1,9}\])*")
"""``name``, ``name.key``, ``name[1]``: names that begin with an underscore are nobody else's."""

Item = int | float | str | None
Value = bool | int | str | tuple[Item, ...]


# No postponed annotations in this file: msgspec would compile them at the first plan that is read.

Natural = Annotated[int, msgspec.Meta(ge=0)]
Ranges = tuple[tuple[Natural, Natural], ...]


class _Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    module: str
    attribute: str
    before: Value
    after: Value


class _Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensor: str
    dim: Natural
    positions: Ranges
    factor: Annotated[float, msgspec.Meta(gt=0)]


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size: Natural
    removed: Ranges


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tables are read entry by entry, so that an error can name the entry."""

    prunus_plan: int
    keep: dict[str, msgspec.Raw]
    shapes: dict[str, msgspec.Raw]
    edits: tuple[_Edit, ...]
    scalings: tuple[_Scaling, ...]
    groups: tuple[_Group, ...]
    costs: dict[str, msgspec.Raw]
    origin: dict[str, Any]
    drops: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    biases: dict[str, Natural] = {}


class _Version(msgspec.Struct, frozen=True):
    prunus_plan: Any


def read(text: str, limit: int = LIMIT) -> dict[str, Any]:
    """The fields of a plan: edits and groups as tuples of what their records are made of."""
    _check_version(text)
    document = _decode(text, _Document, "")
    keep = _table(document.keep, Ranges, "keep")
    shapes: dict[str, Indices] = _table(document.shapes, tuple[Natural, ...], "shapes")
    listed = [*(s.positions for s in document.scalings), *(g.removed for g in document.groups)]
    _check_size([*keep.values(), *listed], limit)
    for place, edit in enumerate(document.edits):
        check_kind(f"edits[{place}]", edit.attribute, edit.before, edit.after)
    check_origin(document.origin)
    if len({*document.drops}) < len(document.drops):
        raise malformed("drops", "a block is dropped twice")
    return {
        "keep": dict(_read_keep(keep, shapes)),
        "shapes": shapes,
        "edits": [msgspec.structs.astuple(edit) for edit in document.edits],
        "scalings": [
            _read_scaling(s, f"scalings[{n}]", shapes) for n, s in enumerate(document.scalings)
        ],
        "groups": [
            (g.name, g.size, read_ranges(g.removed, g.size, f"groups[{n}].removed"))
            for n, g in enumerate(document.groups)
        ],
        "costs": _table(document.costs, tuple[Natural, Natural], "costs"),
        "origin": document.origin,
        "drops": document.drops,
        "biases": dict(_read_biases(document.biases, shapes)),
    }


def write(plan: Any) -> str:
    """One line of JSON for a :class:`Plan`: sorted keys, indices as [start, stop) ranges."""
    edits, scalings, groups = (
        [{name: getattr(record, name) for name in record.__slots__} for record in records]
        for records in (plan.edits, plan.scalings, plan.groups)
    )
    for record, name in [*((s, "positions") for s in scalings), *((g, "removed") for g in groups)]:
        record[name] = to_ranges(record[name])
    document: dict[str, Any] = {
        "prunus_plan": VERSION,
        "keep": {str(axis): to_ranges(stay) for axis, stay in plan.keep.items()},
        "shapes": plan.shapes,
        "edits": edits,
        "scalings": scalings,
        "groups": groups,
        "costs": plan.costs,
        "origin": plan.origin,
        **({"drops": plan.drops} if plan.drops else {}),
        **({"biases": plan.biases} if plan.biases else {}),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def kind_of_edit(attribute: str, before: Any, after: Any) -> str | None:
    """Which of the changes that a plan may make to an attribute this is; None if it is none.

    >>> kind_of_edit("out_features", 8, 5), kind_of_edit("sizes", (8, 3), (5, 3))
    ('integer', 'integers')
    >>> kind_of_edit("config.layer_types", ("full", "local", "full"), ("full", "full"))
    'subsequence'
    >>> kind_of_edit("training", True, False) is kind_of_edit("width", 8, 9) is None
    True
    """
    allowed: tuple[tuple[str, Callable[[Any, Any], bool]], ...] = ()
    if attribute == CLASS:
        allowed = (("adapter", _becomes_equivalent),)
    elif attribute == "use_nested_tensor":  # of PyTorch's encoder, whose layers change their class
        allowed = (("adapter", lambda before, after: before is True and after is False),)
    elif _PATH.fullmatch(attribute):
        allowed = _SETTINGS
    return next((kind for kind, is_such in allowed if is_such(before, after)), None)


def _becomes_equivalent(before: Any, after: Any) -> bool:
    return (type(before) is str or _is_equivalent(before)) and _is_equivalent(after)


def _is_equivalent(value: Any) -> bool:
    """A class of our own table with the positive factor that it keeps."""
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and type(value[0]) is str and type(value[1]) is float and 0 < value[1] < math.inf


def _is_smaller(before: Any, after: Any) -> bool:
    return type(before) is type(after) is int and 0 < after <= before


def _are_smaller(before: Any, after: Any) -> bool:
    if not _hold_only({int}, before, after) or len(before) != len(after):
        return False
    return all(b == a or 0 < a <= b for b, a in zip(before, after, strict=True))


def _is_subsequence(before: Any, after: Any) -> bool:
    if not _hold_only({int, str, NoneType}, before, after):
        return False
    rest = iter(before)
    return 0 < len(after) < len(before) and all(item in rest for item in after)


def _hold_only(kinds: set[type], before: Any, after: Any) -> bool:
    tuples = type(before) is type(after) is tuple
    return tuples and {type(item) for item in (*before, *after)} <= kinds


_SETTINGS = (("integer", _is_smaller), ("integers", _are_smaller), ("subsequence", _is_subsequence))


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


def check_origin(origin: Mapping[str, Any]) -> None:
    """Refuse an origin whose parts that something acts on are not what they should be."""
    steps = origin.get("steps", ()) if len(origin) == 1 else ()
    if not isinstance(steps, (list, tuple)) or not all(isinstance(s, Mapping) for s in steps):
        raise malformed("origin.steps", "expected a list of objects")
    for place, step in enumerate(steps or [origin]):
        where = f"origin.steps[{place}]" if steps else "origin"
        if step.get("traced") not in (None, {}):
            read_traced(step["traced"], f"{where}.traced")
        convert(step.get("stopped", {}), dict[str, str], f"{where}.stopped")


def read_ranges(value: Ranges, size: int, where: str) -> Indices:
    """The inverse of :func:`to_ranges`; it refuses what is not ascending and below size."""
    end, found = 0, list[int]()
    for start, stop in value:
        if start >= stop:
            raise malformed(where, f"the range [{start}, {stop}) is empty")
        if start < end:
            raise malformed(where, f"the range [{start}, {stop}) begins before {end}: not sorted")
        if stop > size:
            raise malformed(where, f"the range [{start}, {stop}) is out of range: {size} exist")
        found += range(start, stop)
        end = stop
    return tuple(found)


def _check_version(text: str) -> None:
    found = _decode(text, _Version, "").prunus_plan
    if type(found) is not int or found not in READABLE:
        raise PlanError(
            f"this is a plan of version {found!r}",
            why=f"this Prunus reads the versions {', '.join(map(str, READABLE))}",
            fix="install the Prunus that wrote it, or plan anew",
        )


def _decode(text: str | msgspec.Raw, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise misplaced(error, where) from error
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise malformed(where or "the text", f"it is not JSON: {error}") from error


def _table(entries: Mapping[str, msgspec.Raw], kind: Any, where: str) -> dict[str, Any]:
    return {name: _decode(entry, kind, f"{where}.{name}") for name, entry in entries.items()}


def _check_size(ranges: Sequence[Ranges], limit: int) -> None:
    """Refuse ranges of too many positions before they are expanded."""
    total = sum(max(0, stop - start) for pairs in ranges for start, stop in pairs)
    if total > limit:
        raise malformed("the text", f"its ranges speak of {total} positions, at most {limit} can")


def _read_keep(
    entries: Mapping[str, Ranges], shapes: Mapping[str, Indices]
) -> Iterator[tuple[Axis, Indices]]:
    for name, ranges in entries.items():
        where = f"keep.{name}"
        tensor, bracket, rest = name.rpartition("[")
        digits = rest.removesuffix("]")
        if not bracket or rest == digits or not (digits.isascii() and digits.isdigit()):
            raise malformed(where, 'an axis is written as "tensor[dim]"')
        axis = Axis(tensor, int(digits[:9]))
        if tensor not in shapes or axis.dim >= len(shapes[tensor]):
            raise malformed(where, "no such axis in the shapes")
        stay = read_ranges(ranges, shapes[tensor][axis.dim], where)
        if not stay:
            raise malformed(where, "it keeps nothing")
        yield axis, stay


def _read_scaling(
    entry: _Scaling, where: str, shapes: Mapping[str, Indices]
) -> tuple[str, int, Indices, float]:
    if entry.tensor not in shapes or entry.dim >= len(shapes[entry.tensor]):
        raise malformed(where, "no such axis in the shapes")
    size = shapes[entry.tensor][entry.dim]
    positions = read_ranges(entry.positions, size, f"{where}.positions")
    return entry.tensor, entry.dim, positions, entry.factor


def _read_biases(
    biases: Mapping[str, int], shapes: Mapping[str, Indices]
) -> Iterator[tuple[str, int]]:
    """Each goes along a dim of a weight beside it; most plans have none."""
    for name, dim in biases.items():
        where = f"biases.{name}"
        prefix, own = name.removesuffix("bias"), shapes.get(name)
        weight = shapes.get(f"{prefix}weight", ())
        fits = prefix != name and (not prefix or prefix.endswith("."))
        if not fits or dim >= len(weight):
            raise malformed(where, "no such dim of a weight in the shapes")
        if own != (weight[dim],):
            raise malformed(where, f"it should have the shape [{weight[dim]}]")
        yield name, dim
