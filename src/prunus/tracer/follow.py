"""Where traced integers come from, and what the forward does with them.

While tracing, the integers that modules keep, and those that ``Tensor.shape`` returns, are
replaced by ones that carry an expression.  A torch-function mode sees the arguments as the
forward wrote them, so a rule can read off which attribute governs which axis.
"""

from __future__ import annotations

import builtins
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from logging import Logger
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

from prunus.graph.expressions import Attribute, Width
from prunus.graph.program import modules_in
from prunus.tracer.provenance import Provenance, plain
from prunus.tracer.registry import Given, integers_in
from prunus.tracer.sizes import Sizes

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
    marks = _Marks()
    for path, module in modules_in(model):
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if type(value) not in _UNMARKED and name not in SKIPPED and not name.startswith("_"):
                marked = marks.mark(value, Attribute(path, name))
                if marked is not value:
                    attributes[name] = marked
    return marks.found


_UNMARKED = frozenset((type(None), bool, float, str, bytes, set, Tensor))


class _Marks:
    """The attributes that were marked, with their present values."""

    def __init__(self) -> None:
        self.found: dict[Attribute, int] = {}
        self._seen: set[int] = set()

    def mark(self, value: Any, at: Attribute) -> Any:
        """The same value with marked integers; an object with settings is changed in place."""
        if isinstance(value, int):
            return self._integer(value, at)
        kind = type(value)
        if kind in (tuple, list, torch.Size):
            return kind(self._inside(at, index, item) for index, item in enumerate(value))
        if kind is dict:
            return {key: self._inside(at, key, item) for key, item in value.items()}
        if id(value) not in self._seen and not at.keys and is_config(value):
            self._settings(vars(value), at)
            self._seen.add(id(value))
        return value

    def _settings(self, own: dict[str, Any], at: Attribute) -> None:
        for key, item in list(own.items()):
            if isinstance(item, int) and not key.startswith("_"):
                own[key] = self._inside(at, key, item)

    def _inside(self, at: Attribute, key: Any, item: Any) -> Any:
        named = isinstance(key, (str, int))
        return self.mark(item, Attribute(at.module, at.name, (*at.keys, key))) if named else item

    def _integer(self, value: int, at: Attribute) -> int:
        if value <= 1 or isinstance(value, Enum):  # True is 1
            return value
        self.found[at] = int(value)
        return Provenance(value, at)


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


def leave_modes(*modes: Any) -> None:
    """Take modes off PyTorch's stacks that an interrupt has left there."""
    while any(mode in modes for mode in overrides._get_current_function_mode_stack()):
        overrides._pop_mode()
    while any(mode in modes for mode in _python_dispatch._get_current_dispatch_mode_stack()):
        _python_dispatch._pop_mode()


class Follow(TorchFunctionMode):
    """Keeps the arguments of the torch function that is running, and marks shapes.

    ``given`` is what the innermost function was called with, for the rules.
    """

    def __init__(
        self,
        sizes: Sizes,
        label_of: Callable[[Tensor, int], Any],
        seal: Callable[[Any, str], None],
    ) -> None:
        super().__init__()
        self._sizes, self._label_of, self._seal = sizes, label_of, seal
        self.given: Given | None = None
        self.arrays: list[tuple[np.ndarray[Any, Any], Tensor]] = []
        """NumPy arrays that tensors were made into, with the tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self._hear(name, args, kwargs)
        if args and name in LEAVES:
            self._seal(args[0], f"it leaves PyTorch as {LEAVES[name]}")
        if func in SEALED:
            self._seal((args, kwargs), f"{name} {SEALED[func]}")
        outer, self.given = self.given, Given(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            self.given = outer
        if name in LEAVES and isinstance(result, np.ndarray):
            self.arrays.append((result, args[0]))
        says = _SAY_SIZES.get(func)
        return result if says is None else says(self, result, *args, **kwargs)

    def _hear(self, name: str, args: Any, kwargs: Any) -> None:
        """What becomes of the integers among the arguments of a function."""
        for value in _numbers(name, args, kwargs):
            if isinstance(value, Provenance) and name in COUNTS:
                self._sizes.counted(value.expression, plain(value))
            elif isinstance(value, Provenance):
                self._sizes.escaped(value.expression)
        if name in _TAKING and args and isinstance(args[0], Tensor):
            for dim, stated in _TAKING[name](*args, **kwargs):
                label = self._label_of(args[0], dim)
                if label is not None:
                    self._sizes.whole(label, stated)

    def _shape(self, result: Any, tensor: Tensor, dim: int | None = None) -> Any:
        if isinstance(result, tuple):
            return torch.Size([self._mark(tensor, d, size) for d, size in enumerate(result)])
        return result if dim is None else self._mark(tensor, dim, result)

    def _length(self, result: int, tensor: Tensor) -> int:
        """``len()`` gives no chance to follow."""
        first = self._mark(tensor, 0, result) if self.given is None else result
        if isinstance(first, Provenance):
            self._sizes.escaped(first.expression)
        return result

    def _count(self, result: Any, input: Tensor) -> int:
        """The number of elements, as the product of the sizes."""
        product: int = 1
        for dim, size in enumerate(input.shape):
            product = product * self._mark(input, dim, size)
        return product if isinstance(product, Provenance) else result

    def _bytes(self, result: int, tensor: Tensor) -> int:
        return self._count(tensor.numel(), tensor) * tensor.element_size()

    def _mark(self, tensor: Tensor, dim: int, size: int) -> int:
        label = self._label_of(tensor, dim)
        return size if label is None else Provenance(size, Width(size, label))


_SAY_SIZES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.shape.__get__, Tensor.size), Follow._shape),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.numel, Tensor.numel, Tensor.nelement), Follow._count),
    Tensor.nbytes.__get__: Follow._bytes,  # type: ignore[attr-defined]
    Tensor.__len__: Follow._length,
}
"""Functions that say sizes: their results are given with where they come from."""


def _all_split(
    tensor: Tensor, split_size: Any = None, dim: Any = 0, **_: Any
) -> Iterator[tuple[int, Any]]:
    whole = isinstance(split_size, int) and isinstance(dim, int) and tensor.dim() > 0
    if whole and split_size >= tensor.shape[dim]:
        yield dim, split_size


def _all_sliced(tensor: Tensor, index: Any) -> Iterator[tuple[int, Any]]:
    """The bounds of slices that take all positions of a dim."""
    shape = tensor.shape
    for dim, item in _by_dim(index if isinstance(index, tuple) else (index,), len(shape)):
        if isinstance(item, slice) and len(range(*item.indices(shape[dim]))) == shape[dim]:
            yield from ((dim, b) for b in (item.start, item.stop) if b is not None and b != 0)


_TAKING: dict[str, Callable[..., Iterator[tuple[int, Any]]]] = {
    "__getitem__": _all_sliced,
    "narrow": lambda tensor, dim=0, start=0, length=None, **_: _all_split(tensor, length, dim),
    "split": _all_split,
}
"""The dims of which a stated number of positions is taken that happens to be all or more.

PyTorch leaves out a slice of all positions, so that no operator shows it.
"""


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
        yield from integers_in((args, tuple(kwargs.values())))
    elif name in FILLED:
        yield from integers_in((args[FILLED[name] :], kwargs.get("fill_value")))


class _Kind(type):
    """The class of what takes the place of ``range``: the same instances, other calls."""

    inform: Callable[[Provenance], None]

    def __call__(cls, *bounds: Any) -> range:
        for bound in bounds:
            if isinstance(bound, Provenance):
                cls.inform(bound)
        return range(*bounds)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, range)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, range)


@contextmanager
def follow_loops(model: nn.Module, counted: Callable[[Any, int], None]) -> Iterator[None]:
    """Hear of integers that the model's own code loops over.

    Python has no hook for this, so the modules in which the model's classes are written get a
    ``range`` of their own, for as long as the context lasts; it makes what ``range`` makes.
    """

    class Range(metaclass=_Kind):
        @staticmethod
        def inform(bound: Provenance) -> None:
            counted(bound.expression, int.__add__(bound, 0))

    spaces = [(space, "range" in space) for space in _spaces(model)]
    try:
        for space, _ in spaces:
            space["range"] = Range
        yield
    finally:
        for space, own in spaces:
            space["range"] = builtins.range
            if not own:
                del space["range"]


def _spaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Variables of the modules in which classes are written, where ``range`` is Python's."""
    kinds = {type(module) for module in model.modules()}
    for name in {base.__module__ for kind in kinds for base in kind.__mro__}:
        if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins"):
            space = vars(sys.modules[name])
            if space.get("range", builtins.range) is builtins.range:
                yield space
