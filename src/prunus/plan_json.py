"""The JSON form of plans: what may stand in it, and a reader that says what is wrong where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prunus.errors import PlanError
from prunus.graph.axis import Axis

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


def read(text: str, version: int, limit: int = LIMIT) -> dict[str, Any]:
    """The fields of a plan: edits and groups as tuples of what their records are made of."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed("the text", f"it is not JSON: {error}") from error
    if not isinstance(document, dict) or "prunus_plan" not in document:
        raise _malformed("the text", 'it has no "prunus_plan"')
    found = document["prunus_plan"]
    if type(found) is not int or found != version:
        raise PlanError(
            f"this is a plan of version {found!r}",
            why=f"this Prunus reads version {version}",
            fix="install the Prunus that wrote it, or plan anew",
        )
    _check_size(document, limit)
    shapes = {n: _read_shape(v, f"shapes.{n}") for n, v in _entries(document, "shapes")}
    return {
        "keep": dict(_read_keep(_entries(document, "keep"), shapes)),
        "shapes": shapes,
        "edits": [_read_edit(e, where) for where, e in _numbered(document, "edits")],
        "scalings": [_read_scaling(s, w, shapes) for w, s in _numbered(document, "scalings")],
        "groups": [_read_group(g, where) for where, g in _numbered(document, "groups")],
        "costs": {n: _pair(v, f"costs.{n}") for n, v in _entries(document, "costs")},
        "origin": _field(document, "origin", dict, ""),
        "drops": tuple(_read_drops(document.get("drops", []))),
        "biases": dict(_read_biases(document.get("biases", {}), shapes)),
    }


def _check_size(document: Mapping[str, Any], limit: int) -> None:
    """Refuse ranges of too many positions before they are expanded."""
    keep, lists = document.get("keep"), (document.get("groups"), document.get("scalings"))
    ranges = list(keep.values()) if isinstance(keep, dict) else []
    for entry in (e for entries in lists if isinstance(entries, list) for e in entries):
        if isinstance(entry, dict):
            ranges += [entry.get("removed"), entry.get("positions")]
    pairs = (pair for entry in ranges if isinstance(entry, list) for pair in entry)
    total = sum(
        max(0, pair[1] - pair[0])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is type(pair[1]) is int
    )
    if total > limit:
        raise _malformed("the text", f"its ranges speak of {total} positions, at most {limit} can")


def _malformed(where: str, why: str) -> PlanError:
    return PlanError(
        "this is no plan, or a damaged one",
        where=where,
        why=why,
        fix="write plans with Plan.save, and edit them with care",
    )


def _refuse_constant(name: str) -> Any:
    raise _malformed("the text", f"{name} is not JSON")


def _typed(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise _malformed(where, f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _integer(value: Any, where: str) -> int:
    if _typed(value, int, where) < 0:
        raise _malformed(where, f"{value} is negative")
    return int(value)


def _pair(value: Any, where: str) -> tuple[int, int]:
    if len(_typed(value, list, where)) != 2:
        raise _malformed(where, f"expected two numbers, found {len(value)}")
    return _integer(value[0], where), _integer(value[1], where)


def _field(document: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    path = f"{where}.{name}" if where else name
    if name not in document:
        raise _malformed(path, "it is missing")
    return _typed(document[name], kind, path)


def _entries(document: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return list(_field(document, name, dict, "").items())


def _numbered(document: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return [(f"{name}[{i}]", entry) for i, entry in enumerate(_field(document, name, list, ""))]


def _read_shape(value: Any, where: str) -> Indices:
    return tuple(_integer(size, where) for size in _typed(value, list, where))


def read_ranges(value: Any, size: int, where: str) -> Indices:
    """The inverse of :func:`to_ranges`; it refuses what is not ascending and below size."""
    end, found = 0, list[int]()
    for entry in _typed(value, list, where):
        start, stop = _pair(entry, where)
        if start >= stop:
            raise _malformed(where, f"the range [{start}, {stop}) is empty")
        if start < end:
            raise _malformed(where, f"the range [{start}, {stop}) begins before {end}: not sorted")
        if stop > size:
            raise _malformed(where, f"the range [{start}, {stop}) is out of range: {size} exist")
        found += range(start, stop)
        end = stop
    return tuple(found)


def _read_keep(
    entries: Sequence[tuple[str, Any]], shapes: Mapping[str, Indices]
) -> Iterator[tuple[Axis, Indices]]:
    for name, ranges in entries:
        where = f"keep.{name}"
        tensor, bracket, rest = name.rpartition("[")
        digits = rest.removesuffix("]")
        if not bracket or rest == digits or not (digits.isascii() and digits.isdigit()):
            raise _malformed(where, 'an axis is written as "tensor[dim]"')
        axis = Axis(tensor, int(digits))
        if tensor not in shapes or axis.dim >= len(shapes[tensor]):
            raise _malformed(where, "no such axis in the shapes")
        stay = read_ranges(ranges, shapes[tensor][axis.dim], where)
        if not stay:
            raise _malformed(where, "it keeps nothing")
        yield axis, stay


def _read_edit(entry: Any, where: str) -> tuple[str, str, Any, Any]:
    _typed(entry, dict, where)
    if "before" not in entry or "after" not in entry:
        raise _malformed(where, 'it needs a "before" and an "after"')
    module, attribute = (_field(entry, name, str, where) for name in ("module", "attribute"))
    parts = re.split(r"[.\[\]]", attribute)
    if attribute != "__class__" and any(part.startswith("__") for part in parts):  # Python's own
        raise _malformed(where, f"{attribute!r} is no attribute that a plan may set")
    return module, attribute, entry["before"], entry["after"]


def _read_scaling(
    entry: Any, where: str, shapes: Mapping[str, Indices]
) -> tuple[str, int, Indices, float]:
    _typed(entry, dict, where)
    tensor, dim = _field(entry, "tensor", str, where), _field(entry, "dim", int, where)
    if tensor not in shapes or not 0 <= dim < len(shapes[tensor]):
        raise _malformed(where, "no such axis in the shapes")
    ranges = _field(entry, "positions", list, where)
    positions = read_ranges(ranges, shapes[tensor][dim], f"{where}.positions")
    return tensor, dim, positions, _field(entry, "factor", float, where)


def _read_drops(value: Any) -> Iterator[str]:
    """Paths of modules; plans from before blocks could be dropped have none."""
    seen: set[str] = set()
    for index, entry in enumerate(_typed(value, list, "drops")):
        where = f"drops[{index}]"
        if not _typed(entry, str, where):
            raise _malformed(where, "it names no module")
        if entry in seen:
            raise _malformed(where, f"{entry} is dropped twice")
        seen.add(entry)
        yield entry


def _read_biases(value: Any, shapes: Mapping[str, Indices]) -> Iterator[tuple[str, int]]:
    """Each goes along a dim of a weight beside it; most plans have none."""
    for name, dim in _typed(value, dict, "biases").items():
        where = f"biases.{name}"
        prefix, own = name.removesuffix("bias"), shapes.get(name)
        weight = shapes.get(f"{prefix}weight", ())
        fits = prefix != name and (not prefix or prefix.endswith("."))
        if not fits or type(dim) is not int or not 0 <= dim < len(weight):
            raise _malformed(where, "no such dim of a weight in the shapes")
        if own != (weight[dim],):
            raise _malformed(where, f"it should have the shape [{weight[dim]}]")
        yield name, dim


def _read_group(entry: Any, where: str) -> tuple[str, int, Indices]:
    _typed(entry, dict, where)
    size = _integer(_field(entry, "size", int, where), f"{where}.size")
    removed = read_ranges(_field(entry, "removed", list, where), size, f"{where}.removed")
    return _field(entry, "name", str, where), size, removed
