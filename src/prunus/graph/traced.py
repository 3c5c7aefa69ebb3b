"""What a plan says of the trace that it was made with: a typed record, read from a file or not.

The description of the inputs is what other code acts on: it is checked before it is kept, and
nothing that it would build is larger than :data:`MOST_ELEMENTS`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from prunus.errors import PlanError

T = TypeVar("T")

MOST_ELEMENTS = 1 << 27
"""Elements of all tensors that a description of inputs may ask for together."""

_DEEPEST = 16
"""Nesting of a description of inputs."""

_DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, sizes in {
        "float": (16, 32, 64),
        "bfloat": (16,),
        "complex": (32, 64, 128),
        "int": (8, 16, 32, 64),
        "uint": (8, 16, 32, 64),
    }.items()
    for bits in sizes
) | {"bool", "float8_e4m3fn", "float8_e5m2"}


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
    outputs: dict[str, tuple[int, ...]]
    released: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    caches: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)] = ()
    forward_fn: Entry | None = None


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensor: tuple[int, ...]
    dtype: str
    values: tuple[int | bool, ...] | None = None
    low: int | None = None
    high: int | None = None


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_traced(value: Any, where: str = "origin.traced") -> Traced:
    """The record of plain data; :class:`~prunus.errors.PlanError` for anything else.

    >>> read_traced({"inputs": None, "outputs": {"output": [2, 3]}}).outputs
    {'output': (2, 3)}
    """
    found = convert(value, Traced, where)
    if any(size < 0 for shape in found.outputs.values() for size in shape):
        raise malformed(f"{where}.outputs", "a size is negative")
    if found.inputs is None or not check_inputs(found.inputs, f"{where}.inputs"):
        return msgspec.structs.replace(found, inputs=None)
    return found


def check_inputs(spec: Any, where: str = "inputs") -> bool:
    """Refuse what describes no inputs; False if they can't be built from the description alone.

    A value is null, a boolean, a finite number, a list of values, ``{"dict": {name: value}}``, or
    ``{"tensor": shape, "dtype": name}`` with, for integers, all ``values`` in a row or a ``low``
    and a ``high`` that they lie between.  A string may be the name of anything, a file's say: it is
    told apart, and whoever reads it from a plan asks for inputs instead.
    """
    call = convert(spec, _Call, where)
    budget = [MOST_ELEMENTS]
    found = [_check(v, f"{where}.args[{n}]", budget, 0) for n, v in enumerate(call.args)]
    found += [_check(v, f"{where}.kwargs.{n}", budget, 0) for n, v in call.kwargs.items()]
    return all(found)


def _check(value: Any, where: str, budget: list[int], depth: int) -> bool:
    if depth > _DEEPEST:
        raise malformed(where, f"it is nested deeper than {_DEEPEST}")
    if isinstance(value, str):
        return False
    if value is None or isinstance(value, (bool, int)):
        return True
    if isinstance(value, float):
        if not math.isfinite(value):
            raise malformed(where, "it is no finite number")
        return True
    if isinstance(value, (list, tuple)):
        items = [_check(v, f"{where}[{n}]", budget, depth + 1) for n, v in enumerate(value)]
        return all(items)
    if isinstance(value, Mapping) and set(value) == {"dict"}:
        named = convert(value["dict"], dict[str, Any], f"{where}.dict")
        items = [_check(v, f"{where}.dict.{n}", budget, depth + 1) for n, v in named.items()]
        return all(items)
    _check_tensor(convert(value, _Tensor, where), where, budget)
    return True


def _check_tensor(tensor: _Tensor, where: str, budget: list[int]) -> None:
    if tensor.dtype not in _DTYPES:
        raise malformed(f"{where}.dtype", f"{tensor.dtype!r} is no type of elements")
    if len(tensor.tensor) > 64 or any(size < 0 for size in tensor.tensor):
        raise malformed(f"{where}.tensor", f"{list(tensor.tensor)[:8]} is no shape")
    if math.prod(max(size, 1) for size in tensor.tensor) >= 1 << 62:
        raise malformed(f"{where}.tensor", "its shape is impossible")
    count = math.prod(tensor.tensor)
    budget[0] -= count
    if budget[0] < 0:
        raise malformed(where, f"the inputs have more than {MOST_ELEMENTS} elements")
    if tensor.values is not None and len(tensor.values) != count:
        raise malformed(f"{where}.values", f"{len(tensor.values)} values for {count} elements")
    bounds, most = (tensor.low or 0, tensor.high or 0), 1 << 63
    if any(not -most <= number < most for number in tensor.values or ()):
        raise malformed(f"{where}.values", "a number does not fit into 64 bits")
    if any(not -most // 2 <= number < most // 2 for number in bounds):
        raise malformed(where, "a bound does not fit into 63 bits")
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
