"""The JSON form of plans: its schema, and a reader that says what is wrong where."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)) and np.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): freeze(item) for key, item in value.items()}
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


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tables are read entry by entry, so that an error can name the entry."""

    prunus_plan: int
    keep: dict[str, msgspec.Raw]
    shapes: dict[str, msgspec.Raw]
    edits: tuple[msgspec.Raw, ...]
    scalings: tuple[msgspec.Raw, ...]
    groups: tuple[msgspec.Raw, ...]
    costs: dict[str, msgspec.Raw]
    origin: dict[str, Any]
    drops: tuple[str, ...] = ()
    biases: dict[str, int] = {}


class _Version(msgspec.Struct, frozen=True):
    prunus_plan: Any


class _Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    module: str
    attribute: str
    before: Value
    after: Value


class _Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensor: str
    dim: int
    positions: tuple[tuple[int, int], ...]
    factor: float


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size: int
    removed: tuple[tuple[int, int], ...]


_Ranges = tuple[tuple[int, int], ...]


def read(text: str, limit: int = LIMIT) -> dict[str, Any]:
    """The fields of a plan: edits and groups as tuples of what their records are made of."""
    _check_version(text)
    document = _decode(text, _Document, "")
    keep = {n: _decode(v, _Ranges, f"keep.{n}") for n, v in document.keep.items()}
    shapes = {n: _read_shape(v, f"shapes.{n}") for n, v in document.shapes.items()}
    edits = _each(document.edits, _Edit, "edits")
    scalings = _each(document.scalings, _Scaling, "scalings")
    groups = _each(document.groups, _Group, "groups")
    listed = [*(s.positions for s in scalings), *(g.removed for g in groups)]
    _check_size([*keep.values(), *listed], limit)
    for place, edit in enumerate(edits):
        if kind_of_edit(edit.attribute, edit.before, edit.after) is None:
            raise malformed(f"edits[{place}]", describe_refusal(edit.attribute))
    check_origin(document.origin)
    return {
        "keep": dict(_read_keep(keep, shapes)),
        "shapes": shapes,
        "edits": [(e.module, e.attribute, e.before, e.after) for e in edits],
        "scalings": [_read_scaling(s, f"scalings[{n}]", shapes) for n, s in enumerate(scalings)],
        "groups": [_read_group(g, f"groups[{n}]") for n, g in enumerate(groups)],
        "costs": {n: _read_cost(v, f"costs.{n}") for n, v in document.costs.items()},
        "origin": document.origin,
        "drops": _read_drops(document.drops),
        "biases": dict(_read_biases(document.biases, shapes)),
    }


def kind_of_edit(attribute: str, before: Any, after: Any) -> str | None:
    """Which of the changes that a plan may make to an attribute this is; None if it is none.

    >>> kind_of_edit("out_features", 8, 5), kind_of_edit("sizes", (8, 3), (5, 3))
    ('integer', 'integers')
    >>> kind_of_edit("config.layer_types", ("full", "local", "full"), ("full", "full"))
    'subsequence'
    >>> kind_of_edit("training", True, False) is kind_of_edit("width", 8, 9) is None
    True
    """
    if attribute == CLASS:
        named = type(before) is str or _is_equivalent(before)
        return "adapter" if named and _is_equivalent(after) else None
    if not _PATH.fullmatch(attribute):
        return None
    if attribute == "use_nested_tensor":  # of PyTorch's encoder, whose layers change their class
        return "adapter" if before is True and after is False else None
    if type(before) is type(after) is int:
        return "integer" if 0 < after <= before else None
    if not (type(before) is type(after) is tuple):
        return None
    if len(before) == len(after) and all(type(item) is int for item in (*before, *after)):
        pairs = zip(before, after, strict=True)
        return "integers" if all(b == a or 0 < a <= b for b, a in pairs) else None
    items = (*before, *after)
    if len(after) < len(before) and all(i is None or type(i) in (int, str) for i in items):
        rest = iter(before)
        return "subsequence" if after and all(item in rest for item in after) else None
    return None


def _is_equivalent(value: Any) -> bool:
    """A class of our own table with the positive factor that it keeps."""
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and type(value[0]) is str and type(value[1]) is float and 0 < value[1] < math.inf


def describe_refusal(attribute: str) -> str:
    """Why an attribute is not changed so."""
    return (
        f"{attribute!r} is not changed in a way that a plan may: integers of a module or its "
        "config become smaller and stay positive, lists lose entries"
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


def read_ranges(value: _Ranges, size: int, where: str) -> Indices:
    """The inverse of :func:`to_ranges`; it refuses what is not ascending and below size."""
    end, found = 0, list[int]()
    for start, stop in value:
        if start < 0:
            raise malformed(where, f"{start} is negative")
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


def _each(entries: Sequence[msgspec.Raw], kind: Any, where: str) -> list[Any]:
    return [_decode(entry, kind, f"{where}[{place}]") for place, entry in enumerate(entries)]


def _check_size(ranges: Sequence[_Ranges], limit: int) -> None:
    """Refuse ranges of too many positions before they are expanded."""
    total = sum(max(0, stop - start) for pairs in ranges for start, stop in pairs)
    if total > limit:
        raise malformed("the text", f"its ranges speak of {total} positions, at most {limit} can")


def _count(value: int, where: str) -> int:
    if value < 0:
        raise malformed(where, f"{value} is negative")
    return value


def _read_shape(value: msgspec.Raw, where: str) -> Indices:
    return tuple(_count(size, where) for size in _decode(value, tuple[int, ...], where))


def _read_cost(value: msgspec.Raw, where: str) -> tuple[int, int]:
    before, after = _decode(value, tuple[int, int], where)
    return _count(before, where), _count(after, where)


def _read_keep(
    entries: Mapping[str, _Ranges], shapes: Mapping[str, Indices]
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
    if entry.tensor not in shapes or not 0 <= entry.dim < len(shapes[entry.tensor]):
        raise malformed(where, "no such axis in the shapes")
    if not 0 < entry.factor < math.inf:
        raise malformed(f"{where}.factor", f"{entry.factor} is no positive finite number")
    size = shapes[entry.tensor][entry.dim]
    positions = read_ranges(entry.positions, size, f"{where}.positions")
    return entry.tensor, entry.dim, positions, entry.factor


def _read_drops(drops: Sequence[str]) -> tuple[str, ...]:
    """Paths of modules; plans from before blocks could be dropped have none."""
    for place, entry in enumerate(drops):
        if not entry:
            raise malformed(f"drops[{place}]", "it names no module")
        if entry in drops[:place]:
            raise malformed(f"drops[{place}]", f"{entry} is dropped twice")
    return tuple(drops)


def _read_biases(
    biases: Mapping[str, int], shapes: Mapping[str, Indices]
) -> Iterator[tuple[str, int]]:
    """Each goes along a dim of a weight beside it; most plans have none."""
    for name, dim in biases.items():
        where = f"biases.{name}"
        prefix, own = name.removesuffix("bias"), shapes.get(name)
        weight = shapes.get(f"{prefix}weight", ())
        fits = prefix != name and (not prefix or prefix.endswith("."))
        if not fits or not 0 <= dim < len(weight):
            raise malformed(where, "no such dim of a weight in the shapes")
        if own != (weight[dim],):
            raise malformed(where, f"it should have the shape [{weight[dim]}]")
        yield name, dim


def _read_group(entry: _Group, where: str) -> tuple[str, int, Indices]:
    size = _count(entry.size, f"{where}.size")
    return entry.name, size, read_ranges(entry.removed, size, f"{where}.removed")
