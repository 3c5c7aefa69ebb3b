"""Integers that remember where they come from.

While tracing, the integers that modules keep, and those that ``Tensor.shape`` returns, are
replaced by a subclass of int that carries an expression.  A torch-function mode sees the
arguments as the forward wrote them, so a rule can read off which attribute governs which axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.graph.expressions import Attribute, Expression, Operation, Width


class Provenance(int):
    """An int that carries the expression it was computed by; results of + − * // % do as well."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> Provenance:
        made = super().__new__(cls, value)
        made.expression = expression
        return made

    def __add__(self, other: Any) -> Any:
        return _combine("+", self, other, int.__add__)

    def __radd__(self, other: Any) -> Any:
        return _combine_reversed("+", self, other, int.__radd__)

    def __sub__(self, other: Any) -> Any:
        return _combine("-", self, other, int.__sub__)

    def __rsub__(self, other: Any) -> Any:
        return _combine_reversed("-", self, other, int.__rsub__)

    def __mul__(self, other: Any) -> Any:
        return _combine("*", self, other, int.__mul__)

    def __rmul__(self, other: Any) -> Any:
        return _combine_reversed("*", self, other, int.__rmul__)

    def __floordiv__(self, other: Any) -> Any:
        return _combine("//", self, other, int.__floordiv__)

    def __rfloordiv__(self, other: Any) -> Any:
        return _combine_reversed("//", self, other, int.__rfloordiv__)

    def __mod__(self, other: Any) -> Any:
        return _combine("%", self, other, int.__mod__)

    def __rmod__(self, other: Any) -> Any:
        return _combine_reversed("%", self, other, int.__rmod__)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __eq__(self, other: Any) -> Any:
        return _tell_compared(self, other, int.__eq__(self, other))

    def __ne__(self, other: Any) -> Any:
        equal = _tell_compared(self, other, int.__eq__(self, other))
        return equal if equal is NotImplemented else not equal

    __hash__ = int.__hash__

    def __neg__(self) -> Any:
        return Provenance(-int(self), Operation("-", 0, self.expression))

    def __float__(self) -> float:
        return float(int(_escape(self)))

    def __truediv__(self, other: Any) -> Any:
        return int.__truediv__(_escape(self), other)

    def __rtruediv__(self, other: Any) -> Any:
        return int.__rtruediv__(_escape(self), other)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(int(_escape(self)), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(other, int(_escape(self)), modulus)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


_listeners: list[Callable[[Expression], None]] = []
_comparisons: list[Callable[[Expression, Expression], None]] = []


def _tell_compared(a: Provenance, b: Any, equal: Any) -> Any:
    """Tell whoever traces that the code has found two integers equal, as a check of sizes does."""
    if equal is True and isinstance(b, Provenance):
        for listener in _comparisons:
            listener(a.expression, b.expression)
    return equal


def _escape(number: Provenance) -> Provenance:
    """Tell whoever traces that the code computes with a number, beyond integer arithmetic."""
    for listener in _listeners:
        listener(number.expression)
    return number


def expression_of(value: Any) -> Expression | None:
    """The expression of an int: itself for a plain one, None for anything else."""
    if isinstance(value, Provenance):
        return value.expression
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _combine(op: str, a: Provenance, b: Any, compute: Callable[[int, int], Any]) -> Any:
    value = compute(a, b) if isinstance(b, int) else NotImplemented
    if value is NotImplemented or isinstance(b, bool):
        return value
    right = b.expression if isinstance(b, Provenance) else int(b)
    return Provenance(value, Operation(op, a.expression, right))


def _combine_reversed(op: str, a: Provenance, b: Any, compute: Callable[[int, int], Any]) -> Any:
    value = compute(a, b) if isinstance(b, int) else NotImplemented
    if value is NotImplemented or isinstance(b, bool):
        return value
    return Provenance(value, Operation(op, int(b), a.expression))


SKIPPED = {"training", "_version", "call_super_init", "dump_patches"}


def mark_attributes(model: nn.Module) -> dict[Attribute, int]:
    """Replace the integers that modules keep, in place; the caller restores the modules.

    Looks into tuples, lists, dicts and plain objects such as configs, one level deep each.
    Integers below 2 are left alone: they are flags and counts of nothing.

    Returns
    -------
    dict
        The present value of every attribute that was marked.
    """
    seen: set[int] = set()
    found: dict[Attribute, int] = {}
    for path, module in model.named_modules():
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if name not in SKIPPED and not name.startswith("_"):
                marked = _mark(value, Attribute(path, name), seen, found)
                if marked is not value:
                    attributes[name] = marked
    return found


def marked_objects(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Attribute dicts of the plain objects that :func:`mark_attributes` changes in place."""
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield vars(value)


def _mark(value: Any, at: Attribute, seen: set[int], found: dict[Attribute, int]) -> Any:
    def inner(key: int | str, item: Any) -> Any:
        return _mark(item, Attribute(at.module, at.name, (*at.keys, key)), seen, found)

    if isinstance(value, int) and not isinstance(value, bool):
        if value > 1 and not isinstance(value, Enum):
            found[at] = int(value)
            return Provenance(value, at)
        return value
    if type(value) in (tuple, list, torch.Size):
        return type(value)(inner(index, item) for index, item in enumerate(value))
    if type(value) is dict:
        named = (str, int)
        return {k: inner(k, v) if isinstance(k, named) else v for k, v in value.items()}
    if is_config(value) and id(value) not in seen and not at.keys:
        seen.add(id(value))
        own = vars(value)
        for key, item in list(own.items()):
            if isinstance(item, int) and not key.startswith("_"):
                own[key] = inner(key, item)
    return value


def is_config(value: Any) -> bool:
    """An instance of an ordinary Python class that only holds settings."""
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor, type, torch.Size)) or callable(value):
        return False
    return hasattr(value, "__dict__") and kind.__module__.partition(".")[0] not in (
        "builtins",
        "torch",
        "typing",
        "functools",
        "collections",
        "enum",
    )


ARITHMETIC = frozenset(
    prefix + name + suffix
    for name in (
        *("mul", "div", "truediv", "add", "sub", "pow", "floor_divide", "true_divide"),
        *("mod", "remainder", "fmod", "lt", "le", "gt", "ge", "eq", "ne", "clamp", "clip"),
        *("tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor", "full_like"),
        *("fill", "masked_fill", "where", "arange", "linspace", "logspace"),
    )
    for prefix, suffix in (("", ""), ("__", "__"), ("__r", "__"), ("__i", "__"), ("", "_"))
)
"""Functions in which an int among the arguments is a number, not a size."""

FILLED = {"full": 1, "new_full": 2}
"""Functions of a size and a number, with the position of the number."""

LEAVES = {
    "numpy": "a NumPy array",
    "__array__": "a NumPy array",
    "tolist": "a list",
    "data_ptr": "a pointer",
    "__dlpack__": "a DLPack capsule",
}
"""Functions that hand a tensor's content to Python, where nobody can follow it: they pin it."""

SEALED: dict[Any, str] = {
    F.multi_head_attention_forward: "computes its sizes by itself; no class with a forward of its "
    "own is replaced, only nn.MultiheadAttention as it is",
    **dict.fromkeys(
        (torch.cov, torch.corrcoef, Tensor.cov, Tensor.corrcoef),
        "divides by the number of its columns",
    ),
}
"""Functions whose integers nobody sees, since PyTorch computes them: they pin all they get."""

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


class Follow(TorchFunctionMode):
    """Keeps the arguments of the torch function that is running, and marks shapes.

    ``given`` is what the innermost function was called with, for the rules.
    """

    def __init__(
        self,
        label_of: Callable[[Tensor, int], Any],
        escaped: Callable[[Expression], None],
        sealed: Callable[[Any, str], None],
        compared: Callable[[Expression, Expression], None],
    ) -> None:
        super().__init__()
        self._label_of = label_of
        self._listener = escaped
        self._sealed = sealed
        self._compared = compared
        self.given: Given | None = None
        self.arrays: list[tuple[np.ndarray[Any, Any], Tensor]] = []
        """NumPy arrays that tensors were made into, with the tensors."""

    def __enter__(self) -> Any:
        _listeners.append(self._listener)
        _comparisons.append(self._compared)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _listeners.remove(self._listener)
        _comparisons.remove(self._compared)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in _numbers(getattr(func, "__name__", ""), args, kwargs):
            if isinstance(value, Provenance):
                self._listener(value.expression)
        leaves = LEAVES.get(getattr(func, "__name__", "")) if args else None
        if leaves is not None:
            self._sealed(args[0], f"it leaves PyTorch as {leaves}")
        if func in SEALED:
            self._sealed((args, kwargs), f"{func.__name__} {SEALED[func]}")
        outer, self.given = self.given, Given(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            self.given = outer
        if leaves is not None and isinstance(result, np.ndarray):
            self.arrays.append((result, args[0]))
        if func == _SHAPE or (func is torch.Tensor.size and isinstance(result, tuple)):
            return torch.Size([self._mark(args[0], d, n) for d, n in enumerate(result)])
        if func is torch.Tensor.size and isinstance(result, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._mark(args[0], dim, result)
        return result

    def _mark(self, tensor: Tensor, dim: int, size: int) -> int:
        label = self._label_of(tensor, dim)
        return size if label is None else Provenance(size, Width(size, label))


def _numbers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """The ints among the arguments of a function that are numbers."""
    if name in ARITHMETIC:
        yield from _integers((args, tuple(kwargs.values())))
    elif name in FILLED:
        yield from _integers((args[FILLED[name] :], kwargs.get("fill_value")))


class Given:
    """The arguments of one torch function as the forward wrote them."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.name = getattr(func, "__name__", "")
        self._args, self._kwargs = args, kwargs

    def sizes(self, count: int) -> list[Any] | None:
        """The ``count`` sizes as they were written; -1 where nothing was written for a dim."""
        bound = bool(self._args) and isinstance(self._args[0], Tensor)
        args = self._args[1:] if bound else self._args
        if self.name == "unflatten" and len(args) == 2:
            at = args[0] + (count - len(args[1]) + 1 if args[0] < 0 else 0)
            return [-1] * at + list(args[1]) + [-1] * (count - at - len(args[1]))
        flat = [value for value in args if isinstance(value, int)]
        if len(flat) == count and len(flat) == len(args):
            return flat
        for value in (*args, *self._kwargs.values()):
            sized = isinstance(value, (tuple, list)) and len(value) == count
            if sized and all(isinstance(item, int) for item in value):
                return list(value)
        return None

    def argument(self, position: int, name: str) -> Any:
        """An argument by its position or name; None if it was left out."""
        return self._args[position] if position < len(self._args) else self._kwargs.get(name)

    def other(self) -> Tensor | None:
        """The second tensor argument, as in ``x.view_as(other)``."""
        tensors = [v for v in (*self._args, *self._kwargs.values()) if isinstance(v, Tensor)]
        return tensors[1] if len(tensors) > 1 else None

    def expression(self, value: int) -> Expression:
        """The expression of an argument of that value; the value itself if none has one."""
        for found in _integers((self._args, tuple(self._kwargs.values()))):
            if isinstance(found, Provenance) and int(found) == value:
                return found.expression
        return value


def _integers(structure: Any) -> Iterator[int]:
    if isinstance(structure, int):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from _integers(item)
    elif isinstance(structure, slice):
        for bound in (structure.start, structure.stop):
            if isinstance(bound, int):
                yield bound
