"""The JSON form of plans: its schema, and a reader that says what is wrong where."""

# No postponed annotations in this file: msgspec would compile them at the first plan that is read.

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from prunus.errors import PlanError
from prunus.graph.axis import Axis
from prunus.graph.plan_records import Edit, GroupChoice, Scaling, check_kind

T = TypeVar("T")
Indices = tuple[int, ...]

LIMIT = 1 << 27
"""Positions that a plan may speak of, and elements of all the inputs that it describes.

As ranges and shapes they take a few bytes, as numbers gigabytes.
"""

_DEEPEST = 16
"""Nesting of a description of inputs."""

_DTYPES = (
    r"^(float(16|32|64)|bfloat16|complex(32|64|128)|u?int(8|16|32|64)|bool|float8_(e4m3fn|e5m2))$"
)

Natural = Annotated[int, msgspec.Meta(ge=0)]
_Integer = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Bound = Annotated[int, msgspec.Meta(ge=-(1 << 62), lt=1 << 62)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was run in place of the forward; for people, nothing calls it."""

    method: str | None = None
    function: str | None = None


class Traced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model was traced with.

    Attributes
    ----------
    inputs
        ``{"args": [...], "kwargs": {...}}``, see :func:`check_inputs`; None where the inputs can't
        be built again from a description.
    outputs
        Name → shape of every output that keeps its shape.
    released
        Names of the outputs that may shrink.
    unread
        Parameters that the traced forward did not read.
    written
        Tensor attributes that the forward assigned: it makes them anew, so a model may lack them.
    caches
        ``"path.of.module:attribute"`` of what the forward keeps from one call to the next.
    forward_fn
        What was run in place of the forward.
    """

    inputs: Any
    outputs: dict[str, tuple[Natural, ...]]
    released: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    caches: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)] = ()
    forward_fn: Entry | None = None


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensor: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=64)]
    dtype: Annotated[str, msgspec.Meta(pattern=_DTYPES)]
    values: tuple[_Integer | bool, ...] | None = None
    low: _Bound | None = None
    high: _Bound | None = None


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_traced(value: Any, where: str = "origin.traced") -> Traced:
    """The record of plain data; :class:`~prunus.errors.PlanError` for anything else.

    >>> read_traced({"inputs": None, "outputs": {"output": [2, 3]}}).outputs
    {'output': (2, 3)}
    """
    found = convert(value, Traced, where)
    if found.inputs is None or not check_inputs(found.inputs, f"{where}.inputs"):
        return msgspec.structs.replace(found, inputs=None)
    return found


def check_inputs(spec: Any, where: str = "inputs") -> bool:
    """Refuse what describes no inputs; False if they can't be built from the description alone.

    A value is null, a boolean, a number, a list of values, ``{"dict": {name: value}}``, or
    ``{"tensor": shape, "dtype": name}`` with, for integers, all ``values`` in a row or a ``low``
    and a ``high`` that they lie between.  A string may be the name of anything, a file's say: it is
    told apart, and whoever reads it from a plan asks for inputs instead.
    """
    call = convert(spec, _Call, where)
    budget = [LIMIT]
    items = [(f".args[{n}]", value) for n, value in enumerate(call.args)]
    items += [(f".kwargs.{name}", value) for name, value in call.kwargs.items()]
    return _check_all(items, where, budget, 0)


def _check(value: Any, where: str, budget: list[int], depth: int) -> bool:
    if depth > _DEEPEST:
        raise malformed(where, f"it is nested deeper than {_DEEPEST}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return not isinstance(value, str)
    items: list[tuple[str, Any]]
    if isinstance(value, (list, tuple)):
        items = [(f"[{n}]", item) for n, item in enumerate(value)]
    elif isinstance(value, Mapping) and set(value) == {"dict"}:
        named = convert(value["dict"], dict[str, Any], f"{where}.dict")
        items = [(f".dict.{name}", item) for name, item in named.items()]
    else:
        _check_tensor(convert(value, _Tensor, where), where, budget)
        return True
    return _check_all(items, where, budget, depth + 1)


def _check_all(items: Sequence[tuple[str, Any]], where: str, budget: list[int], depth: int) -> bool:
    found = [_check(item, f"{where}{place}", budget, depth) for place, item in items]
    return all(found)


def _check_tensor(tensor: _Tensor, where: str, budget: list[int]) -> None:
    budget[0] -= math.prod(max(size, 1) for size in tensor.tensor)
    if budget[0] < 0:
        raise malformed(where, f"the inputs have more than {LIMIT} elements")
    count = math.prod(tensor.tensor)
    if tensor.values is not None and len(tensor.values) != count:
        raise malformed(f"{where}.values", f"{len(tensor.values)} values for {count} elements")
    if (tensor.low is None) != (tensor.high is None):
        raise malformed(where, 'it needs both a "low" and a "high", or neither')
    if tensor.low is not None and tensor.high is not None and tensor.low > tensor.high:
        raise malformed(where, f"low is {tensor.low}, above high, {tensor.high}")


def convert(value: Any, kind: type[T], where: str) -> T:
    """A value as the type says, with nothing coerced but lists to tuples."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise misplaced(error, where) from error


def misplaced(error: Exception, where: str) -> PlanError:
    """The error of a schema with its place: ``$.a[0]`` below ``where``."""
    why, _, path = str(error).partition(" - at `$")
    return malformed(f"{where}{path.removesuffix('`')}".lstrip("."), why)


def malformed(where: str, why: str) -> PlanError:
    """The error for a plan whose text is none, or whose parts don't fit together."""
    return PlanError(
        "this is no plan, or a damaged one",
        where=where,
        why=why,
        fix="write plans with Plan.save, and edit them with care",
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

Item = int | float | str | None
Value = bool | int | str | tuple[Item, ...]


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
    """The fields of a plan."""
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
        "edits": tuple(Edit(*msgspec.structs.astuple(edit)) for edit in document.edits),
        "scalings": tuple(
            _read_scaling(s, f"scalings[{n}]", shapes) for n, s in enumerate(document.scalings)
        ),
        "groups": tuple(
            GroupChoice(g.name, g.size, read_ranges(g.removed, g.size, f"groups[{n}].removed"))
            for n, g in enumerate(document.groups)
        ),
        "costs": _table(document.costs, tuple[Natural, Natural], "costs"),
        "origin": document.origin,
        "drops": document.drops,
        "biases": dict(_read_biases(document.biases, shapes)),
    }


def write(plan: Any) -> str:
    """One line of JSON for a :class:`Plan`: sorted keys, indices as [start, stop) ranges."""
    document: dict[str, Any] = {
        "prunus_plan": VERSION,
        "keep": {str(axis): to_ranges(stay) for axis, stay in plan.keep.items()},
        "shapes": plan.shapes,
        "edits": [_entry(edit) for edit in plan.edits],
        "scalings": [_entry(s, positions=to_ranges(s.positions)) for s in plan.scalings],
        "groups": [_entry(group, removed=to_ranges(group.removed)) for group in plan.groups],
        "costs": plan.costs,
        "origin": plan.origin,
        **({"drops": plan.drops} if plan.drops else {}),
        **({"biases": plan.biases} if plan.biases else {}),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def _entry(record: Any, **instead: Any) -> dict[str, Any]:
    return {one.name: getattr(record, one.name) for one in fields(record)} | instead


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


def _read_scaling(entry: _Scaling, where: str, shapes: Mapping[str, Indices]) -> Scaling:
    if entry.tensor not in shapes or entry.dim >= len(shapes[entry.tensor]):
        raise malformed(where, "no such axis in the shapes")
    size = shapes[entry.tensor][entry.dim]
    positions = read_ranges(entry.positions, size, f"{where}.positions")
    return Scaling(entry.tensor, entry.dim, positions, entry.factor)


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
