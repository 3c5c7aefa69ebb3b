"""What a plan says of the trace that it was made with: a typed record, read from a file or not.

The description of the inputs is what other code acts on: it is checked before it is kept, and
nothing that it would build is larger than :data:`MOST_ELEMENTS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from prunus.errors import PlanError

T = TypeVar("T")

MOST_ELEMENTS = 1 << 27
"""Elements of all tensors that a description of inputs may ask for together."""

_DEEPEST = 16
"""Nesting of a description of inputs."""

_DTYPES = (
    r"^(float(16|32|64)|bfloat16|complex(32|64|128)|u?int(8|16|32|64)|bool|float8_(e4m3fn|e5m2))$"
)

_Natural = Annotated[int, msgspec.Meta(ge=0)]
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
    outputs: dict[str, tuple[_Natural, ...]]
    released: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    caches: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)] = ()
    forward_fn: Entry | None = None


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensor: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=64)]
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
    budget = [MOST_ELEMENTS]
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
        raise malformed(where, f"the inputs have more than {MOST_ELEMENTS} elements")
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
