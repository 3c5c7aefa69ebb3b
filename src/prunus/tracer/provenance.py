"""Integers that remember where they come from.

While tracing, the integers that modules keep, and those that ``Tensor.shape`` returns, are
replaced by a subclass of int that carries an expression.  A torch-function mode sees the
arguments as the forward wrote them, so a rule can read off which attribute governs which axis.
"""

from __future__ import annotations

import dis
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from logging import Logger
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.graph.axis import Label
from prunus.graph.expressions import Attribute, Expression, Operation, Width
from prunus.graph.program import modules_in
from prunus.tracer.marks import Mark
from prunus.tracer.sources import is_users


class Provenance(int):
    """An int that carries the expression it was computed by; results of + − * // % do as well."""

    expression: Expression
    mark: Mark

    def __new__(cls, value: int, expression: Expression) -> Provenance:
        made = super().__new__(cls, value)
        made.expression = expression
        made.mark = Mark()
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

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << int(other)) if _is_plain(other) else _escaped(self) >> other

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << int(other)) if _is_plain(other) else _escaped(self) << other

    def __and__(self, other: Any) -> Any:
        return _escaped(self) & other

    def __or__(self, other: Any) -> Any:
        return _escaped(self) | other

    def __xor__(self, other: Any) -> Any:
        return _escaped(self) ^ other

    def __rrshift__(self, other: Any) -> Any:
        return other >> _escaped(self)

    def __rlshift__(self, other: Any) -> Any:
        return other << _escaped(self)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Any:
        return -1 - self

    def __eq__(self, other: Any) -> Any:
        return _compare("==", self, other, int.__eq__(self, other))

    def __ne__(self, other: Any) -> Any:
        equal = _compare("==", self, other, int.__eq__(self, other))
        return equal if equal is NotImplemented else not equal

    def __lt__(self, other: Any) -> Any:
        return _compare("<", self, other, int.__lt__(self, other))

    def __le__(self, other: Any) -> Any:
        return _compare("<=", self, other, int.__le__(self, other))

    def __gt__(self, other: Any) -> Any:
        return _compare(">", self, other, int.__gt__(self, other))

    def __ge__(self, other: Any) -> Any:
        return _compare(">=", self, other, int.__ge__(self, other))

    def __hash__(self) -> int:
        run = self.mark.run
        if run is None:
            return int.__hash__(self)
        run.hashed = True
        return run.hash_of(self.expression) if run.apart else hash(_escaped(self))

    def __bool__(self) -> bool:
        return bool(_compare("bool", self, 0, int.__ne__(self, 0)))

    def __neg__(self) -> Any:
        return Provenance(-int.__pos__(self), Operation("-", 0, self.expression))

    def __pos__(self) -> Any:
        return self

    __trunc__ = __floor__ = __ceil__ = __pos__

    def __abs__(self) -> Any:
        return self if int.__ge__(self, 0) else -self

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None or digits >= 0 else round(_escaped(self), digits)

    def __int__(self) -> int:
        return _cast(self)

    def __float__(self) -> float:
        return float(_escaped(self))

    def __truediv__(self, other: Any) -> Any:
        return _ratio(self, other) if isinstance(other, int) else _escaped(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return _ratio(other, self) if isinstance(other, int) else other / _escaped(self)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(_escaped(self), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return pow(other, _escaped(self), modulus)

    def __str__(self) -> str:
        return str(_spelt(self))

    def __repr__(self) -> str:
        return repr(_spelt(self))

    def __format__(self, how: str) -> str:
        return format(_spelt(self), how)

    def bit_length(self) -> int:
        return _escaped(self).bit_length()

    def bit_count(self) -> int:
        return _escaped(self).bit_count()

    def to_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        return _escaped(self).to_bytes(*args, **kwargs)

    def as_integer_ratio(self) -> Any:
        return self, 1

    def conjugate(self) -> Any:
        return self

    real = numerator = property(conjugate)

    def __copy__(self) -> int:
        return plain(self)

    def __deepcopy__(self, memo: Any) -> int:
        return plain(self)

    def __reduce__(self) -> Any:
        return int, (plain(self),)


class Ratio(float):
    """The quotient of two such integers, where it is whole: ``int()`` of it is followed.

    Whatever else is done with it is arithmetic that is not.
    """

    expression: Expression

    def __int__(self) -> int:
        for listener in _listeners:
            listener.cast(self.expression, int(float.__trunc__(self)), self)
        return int(float.__trunc__(self))

    def __trunc__(self) -> int:
        return self.__int__()

    def __floor__(self) -> int:
        return self.__int__()

    def __ceil__(self) -> int:
        return self.__int__()

    def __round__(self, digits: Any = None) -> Any:
        return self.__int__() if digits is None else self


class Listener(Protocol):
    """Who traces, and wants to know what the code does with the integers."""

    def escaped(self, expression: Expression) -> None:
        """The code computes with a number, beyond what can be followed."""

    def counted(self, expression: Expression, value: int) -> None:
        """The code does something that often."""

    def compared(self, op: str, a: Expression, b: Expression, outcome: bool) -> None:
        """The code asks for ``a op b``, op one of ``== < <= > >=``, or whether ``a`` is true."""

    def cast(self, expression: Expression, value: int, ratio: Ratio | None) -> None:
        """The code takes the plain int, of a quotient where there was one."""

    def divided(self, ratio: Ratio) -> None:
        """The code divides; an escape, unless all that it does with the quotient is a cast."""

    def whole(self, label: Label, stated: int) -> None:
        """The code takes so many positions of a dim, which are all of them in this run."""


_listeners: list[Listener] = []


def plain(number: int) -> int:
    """The same number without its expression; nobody is told."""
    return int.__add__(number, 0)


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, Provenance)


def _compare(op: str, a: Provenance, b: Any, outcome: Any) -> Any:
    """Tell whoever traces that the code asks how two integers compare."""
    if outcome is not NotImplemented and _listeners:
        other = expression_of(b)
        if other is not None:
            for listener in _listeners:
                listener.compared(op, a.expression, other, outcome)
    elif isinstance(b, float):
        _escaped(a)
    return outcome


def _escaped(number: Provenance) -> int:
    """The plain number, of which whoever traces is told that the code computes with it."""
    for listener in _listeners:
        listener.escaped(number.expression)
    return plain(number)


def _spelt(number: Provenance) -> int:
    """The plain number, which the forward's own code writes down: in a key or a name, as a rule."""
    return _escaped(number) if _listeners and is_users(sys._getframe(2)) else plain(number)


def _cast(number: Provenance) -> int:
    """``int(number)``; numpy asks for it as well, where a product of sizes can be followed."""
    value, expression = plain(number), number.expression
    if _listeners:
        product = _product_in_numpy(sys._getframe(2))
        if product is not None:
            value, expression = plain(product), product.expression
        for listener in _listeners:
            listener.cast(expression, value, None)
    return plain(number)


def _product_in_numpy(frame: Any) -> Provenance | None:
    """What ``numpy.prod`` is about to return, if that is what runs."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("numpy"):
        if frame.f_code.co_name == "prod":
            factors, product = frame.f_locals.get("a"), 1
            if not isinstance(factors, (tuple, list)):
                return None
            for factor in factors:
                product = product * factor
            return product if isinstance(product, Provenance) else None
        frame = frame.f_back
    return None


def _ratio(a: int, b: int) -> Any:
    """``a / b`` of integers, at least one of which has an expression."""
    value = plain(a) / plain(b)
    expressions = expression_of(a), expression_of(b)
    if None in expressions or not value.is_integer() or not _is_argument(sys._getframe(2)):
        for number in (a, b):
            if isinstance(number, Provenance):
                _escaped(number)
        return value
    found = Ratio(value)
    found.expression = Operation("//", *expressions)  # type: ignore[arg-type]
    for listener in _listeners:
        listener.divided(found)
    return found


def _is_argument(frame: Any) -> bool:
    """Whether what the frame computes at present goes into a call of one argument, as ``int``."""
    following = (
        one
        for one in dis.get_instructions(frame.f_code)
        if one.offset > frame.f_lasti and one.opname not in ("CACHE", "PRECALL")
    )
    then = next(following, None)
    return then is not None and then.opname in ("CALL", "CALL_FUNCTION") and then.arg == 1


def expression_of(value: Any) -> Expression | None:
    """The expression of an int: itself for a plain one, None for anything else."""
    if isinstance(value, Provenance):
        return value.expression
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return int(value) if whole else None


def _combine(op: str, a: Provenance, b: Any, compute: Callable[[int, int], Any]) -> Any:
    value = compute(a, b) if isinstance(b, int) else NotImplemented
    if value is NotImplemented:
        _leave(a, b)
        return value
    if isinstance(b, bool):
        return value
    right = b.expression if isinstance(b, Provenance) else int(b)
    return Provenance(value, Operation(op, a.expression, right))


def _combine_reversed(op: str, a: Provenance, b: Any, compute: Callable[[int, int], Any]) -> Any:
    value = compute(a, b) if isinstance(b, int) else NotImplemented
    if value is NotImplemented:
        _leave(a, b)
        return value
    if isinstance(b, bool):
        return value
    return Provenance(value, Operation(op, int(b), a.expression))


def _leave(a: Provenance, b: Any) -> None:
    """Arithmetic with something that is no integer: with floats, and how often a list repeats."""
    if isinstance(b, (float, complex, list, tuple, str)):
        _escaped(a)


SKIPPED = {"training", "_version", "call_super_init", "dump_patches"}


PLAIN = frozenset((type(None), bool, int, float, str, bytes, tuple, list, dict, set, Tensor))
"""Types of most attributes of modules: neither functions nor objects that hold settings."""


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
    for path, module in modules_in(model):
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if name not in SKIPPED and not name.startswith("_"):
                marked = _mark(value, Attribute(path, name), seen, found)
                if marked is not value:
                    attributes[name] = marked
    return found


def marked_objects(modules: Iterable[nn.Module]) -> Iterator[dict[str, Any]]:
    """Attribute dicts of the plain objects that :func:`mark_attributes` changes in place."""
    seen: set[int] = set()
    for module in modules:
        for name, value in vars(module).items():
            if type(value) in PLAIN or name.startswith("_"):
                continue
            if is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield vars(value)


def _mark(value: Any, at: Attribute, seen: set[int], found: dict[Attribute, int]) -> Any:
    def inner(key: int | str, item: Any) -> Any:
        return _mark(item, Attribute(at.module, at.name, (*at.keys, key)), seen, found)

    if isinstance(value, int):
        return _mark_integer(value, at, found)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(inner(index, item) for index, item in enumerate(value))
    if type(value) is dict:
        named = (str, int)
        return {k: inner(k, v) if isinstance(k, named) else v for k, v in value.items()}
    if id(value) not in seen and not at.keys and is_config(value):
        seen.add(id(value))
        numbers = {k: v for k, v in vars(value).items() if isinstance(v, int) and k[:1] != "_"}
        vars(value).update({key: inner(key, item) for key, item in numbers.items()})
    return value


def _mark_integer(value: int, at: Attribute, found: dict[Attribute, int]) -> int:
    if value <= 1 or isinstance(value, Enum):  # True is 1
        return value
    found[at] = int(value)
    return Provenance(value, at)


def is_config(value: Any) -> bool:
    """An instance of an ordinary Python class that only holds settings.

    Loggers, locks, files and the like of Python's own library are none.
    """
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor, type, Enum)) or callable(value):
        return False
    if not hasattr(value, "__dict__") or isinstance(value, (BaseException, ModuleType, Logger)):
        return False
    package = kind.__module__.partition(".")[0]
    return kind in (SimpleNamespace, Namespace) or not (
        package == "torch" or package in sys.stdlib_module_names
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

COUNTS = {"roll", "pad", "eye", "one_hot", "tril_indices", "triu_indices", "randperm", "randint",
          "bincount", "topk", "kthvalue", "unfold", "chunk", "tensor_split", "multinomial",
          "tril", "triu", "diagonal", "interpolate"}  # fmt: skip
"""Functions in which an int says how often or how far: no equation is read off it."""

_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_NBYTES = torch.Tensor.nbytes.__get__  # type: ignore[attr-defined]


class Follow(TorchFunctionMode):
    """Keeps the arguments of the torch function that is running, and marks shapes.

    ``given`` is what the innermost function was called with, for the rules.
    """

    def __init__(
        self,
        sizes: Listener,
        label_of: Callable[[Tensor, int], Any],
        seal: Callable[[Any, str], None],
    ) -> None:
        super().__init__()
        self._sizes, self._label_of, self._seal = sizes, label_of, seal
        self.given: Given | None = None
        self.arrays: list[tuple[np.ndarray[Any, Any], Tensor]] = []
        """NumPy arrays that tensors were made into, with the tensors."""

    def __enter__(self) -> Any:
        _listeners.append(self._sizes)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _listeners.remove(self._sizes)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        for value in _numbers(name, args, kwargs):
            if isinstance(value, Provenance):
                if name in COUNTS:
                    self._sizes.counted(value.expression, plain(value))
                else:
                    self._sizes.escaped(value.expression)
        leaves = LEAVES.get(name) if args else None
        if leaves is not None:
            self._seal(args[0], f"it leaves PyTorch as {leaves}")
        if func in SEALED:
            self._seal((args, kwargs), f"{func.__name__} {SEALED[func]}")
        if name in ("__getitem__", "narrow", "split"):
            self._whole(name, args, kwargs)
        outer, self.given = self.given, Given(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            self.given = outer
        if leaves is not None and isinstance(result, np.ndarray):
            self.arrays.append((result, args[0]))
        return self._marked(func, name, args, kwargs, result)

    def _whole(self, name: str, args: Any, kwargs: Any) -> None:
        for dim, stated in _all_of_a_dim(name, args, kwargs):
            label = self._label_of(args[0], dim)
            if label is not None:
                self._sizes.whole(label, stated)

    def _marked(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> Any:
        """A result that says sizes, with where they come from."""
        if func == _NBYTES:
            return self._count(args[0], args[0].numel()) * args[0].element_size()
        if func == _SHAPE or func is torch.Tensor.size:
            if isinstance(result, tuple):
                return torch.Size([self._mark(args[0], d, n) for d, n in enumerate(result)])
            return self._mark(args[0], args[1] if len(args) > 1 else kwargs["dim"], result)
        if name in ("numel", "nelement") and isinstance(result, int):
            return self._count(kwargs.get("input", args[0] if args else None), result)
        if func is torch.Tensor.__len__ and self.given is None:
            first = self._mark(args[0], 0, result)
            if isinstance(first, Provenance):  # len() gives no chance to follow
                self._sizes.escaped(first.expression)
        return result

    def _count(self, tensor: Tensor, count: int) -> int:
        """The number of elements, as the product of the sizes."""
        product: int = 1
        for dim, size in enumerate(tensor.shape):
            product = product * self._mark(tensor, dim, size)
        return product if isinstance(product, Provenance) else count

    def _mark(self, tensor: Tensor, dim: int, size: int) -> int:
        label = self._label_of(tensor, dim)
        return size if label is None else Provenance(size, Width(size, label))


def _all_of_a_dim(name: str, args: Any, kwargs: Any) -> Iterator[tuple[int, Any]]:
    """Dims of which a stated number of positions is taken that happens to be all or more.

    PyTorch leaves out a slice of all positions, so that no operator shows it.
    """
    if not args or not isinstance(args[0], Tensor):
        return
    shape, rest = args[0].shape, args[1:]
    if name == "__getitem__":
        yield from _whole_slices(rest[0] if isinstance(rest[0], tuple) else rest[:1], shape)
        return
    names = ("dim", "start", "length") if name == "narrow" else ("split_size", "dim")
    values = dict(zip(names, rest, strict=False)) | dict(kwargs)
    stated, dim = values.get("length" if name == "narrow" else "split_size"), values.get("dim", 0)
    if isinstance(stated, int) and isinstance(dim, int) and shape and stated >= shape[dim]:
        yield dim, stated


def _whole_slices(index: Sequence[Any], shape: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The bounds of slices that take all positions of a dim."""
    for dim, item in _by_dim(index, len(shape)):
        if isinstance(item, slice) and len(range(*item.indices(shape[dim]))) == shape[dim]:
            yield from ((dim, b) for b in (item.start, item.stop) if b is not None and b != 0)


def _by_dim(index: Sequence[Any], dims: int) -> Iterator[tuple[int, Any]]:
    """The items of an index with the dims that they speak of."""

    def width(item: Any) -> int:
        if item is None or item is Ellipsis or isinstance(item, bool):
            return 0
        mask = isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)
        return item.dim() if mask else 1

    dim, rest = 0, sum(map(width, index))
    for item in index:
        if item is Ellipsis:
            dim += dims - rest
            continue
        if width(item) and dim < dims:
            yield dim, item
        dim += width(item)


def _numbers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """The ints among the arguments of a function that are numbers."""
    if name in ARITHMETIC or name in COUNTS:
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
        written = (args, *args, *self._kwargs.values())
        return next((list(one) for one in written if _are_sizes(one, count)), None)

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
            if isinstance(found, Provenance) and plain(found) == value:
                return found.expression
        return value


def _are_sizes(value: Any, count: int) -> bool:
    listed = isinstance(value, (tuple, list)) and len(value) == count
    return listed and all(isinstance(item, (int, np.integer)) for item in value)


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
