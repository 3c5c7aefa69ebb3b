"""Copies of a model: a deep one, and a stand-in that shares the model's memory.

``copy.deepcopy`` takes functions as they are.  A hook that closes over a module, or a forward
that was patched onto one, would go on reading the original.  Here functions, bound methods and
partials are made anew around the copies of what they refer to.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (
    *(int, float, str, bool, type(None), type(Ellipsis), bytes, complex, slice, range, type),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout),
    *(types.ModuleType, types.BuiltinFunctionType, types.CodeType),
)
"""What is never copied, being immutable or a name of something outside of the model."""

_ATOMIC = frozenset(_ATOMS)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

Made = TypeVar("Made")

_SHARED = (
    *("torch.fx", "torch._", "torch.jit", "logging", "threading", "_thread", "builtins"),
    *("concurrent", "multiprocessing", "asyncio", "queue", "subprocess", "socket", "sqlite3"),
)
"""Packages whose objects are not entered: graphs of nodes, and names of the interpreter's own."""

DEEPEST = 4
"""Plain objects are copied that deep; what lies deeper (a trainer and its world) is shared."""


class Copy(NamedTuple):
    """A copied model, and what stands for anything that the original refers to."""

    model: nn.Module
    of: Callable[[Any], Any]


def duplicate(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy; tensors that PyTorch refuses to copy are copied as data.

    Those are what the model computed from its weights (the older ``weight_norm`` keeps it as an
    attribute), and sparse ones in compressed form (CSR).

    Parameters
    ----------
    share
        Let the copy's parameters, which are its own objects, read the memory of the model's: for
        a copy that is cut or run, which writes to none of them.
    """
    return _Copier(model, _clone_data if share else _clone).made()[0]


def deep_copy(model: nn.Module) -> Copy:
    """A copy with memory of its own, that of modules which are none of the model's apart."""
    return _Copier(model, _clone).made()


def stand_in(model: nn.Module) -> Copy:
    """A copy whose tensors are others with the same memory: only a write into it would be seen.

    Whatever runs on it may set attributes, fill containers and run hooks.
    """
    return _Copier(model, _alias).made()


def _clone_data(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    return (_alias if type(tensor) is nn.Parameter else _clone)(tensor, memo)


def _alias(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Another tensor of the same memory; special kinds of tensors are shared as they are."""
    made: Tensor
    if type(tensor) is nn.Parameter:
        made = Tensor._make_subclass(nn.Parameter, tensor, tensor.requires_grad)
    elif type(tensor) is Tensor:
        made = tensor.detach()
    else:
        return tensor
    if tensor.__dict__:
        made.__dict__.update(tensor.__dict__)
    return made


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _clone(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if not tensor.is_leaf or tensor.layout in _COMPRESSED:
        return tensor.detach().clone()
    made: Tensor = copy.deepcopy(tensor, memo)
    return made


class _Copier:
    """One copy of one model, with the copy of everything that was met by the original's id."""

    def __init__(
        self, model: nn.Module, tensor: Callable[[Tensor, dict[int, Any]], Tensor]
    ) -> None:
        self._model = model
        self._make = tensor
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is met twice
        self._own = {id(module): module for module in model.modules()}
        self._depth = 0

    def made(self) -> Copy:
        """The copy; modules come first, so that whatever refers to one finds it."""
        for module in self._own.values():
            if id(module) not in self._memo:
                self._reserve(module)
        for module in self._own.values():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    self._copy(tensor)
        for module in self._own.values():
            self._fill(module)
        return Copy(self._memo[id(self._model)], self._copy)

    def _reserve(self, module: nn.Module) -> None:
        """An empty module of the same class; a copy where the class has its own way to make one."""
        kind = type(module)
        theirs = getattr(kind, "__deepcopy__", None)
        special = theirs is not None and not str(theirs.__module__).startswith("torch.")
        special = special or isinstance(module, torch.jit.ScriptModule)
        if special and self._make is _clone:
            with suppress(Exception):  # a class may refuse to be copied with any error
                self._memo[id(module)] = made = copy.deepcopy(module, self._memo)
                if isinstance(module, torch.jit.ScriptModule):
                    self._pair(module, made)
                return
        try:
            if isinstance(module, torch.jit.ScriptModule):
                self._memo[id(module)] = module
                self._pair(module, module)
            else:
                self._memo[id(module)] = object.__new__(kind)
        except TypeError:  # a class that is something else beside a module
            self._memo[id(module)] = module

    def _pair(self, module: nn.Module, made: nn.Module) -> None:
        """What stands for the parts and tensors of a ScriptModule: those that its copy runs on."""
        for (_, one), (_, other) in zip(module.named_modules(), made.named_modules(), strict=True):
            self._keep(one, other)
            for name in ("_parameters", "_buffers"):
                theirs = dict(getattr(other, name).items())
                for key, tensor in getattr(one, name).items():
                    if tensor is not None:
                        self._keep(tensor, theirs[key])

    def _fill(self, module: nn.Module) -> None:
        made = self._memo[id(module)]
        if made is module or vars(made):
            return
        own = vars(made)
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMIC:
                own[name] = value
            elif name not in _OF_EVERY_MODULE:
                own[name] = self._copy(value)
            else:
                own[name] = self._copy(value) if value else kind()  # no other module's

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMIC:
            return value
        if (kind is dict or kind is list or kind is set) and not value:
            known = self._memo.get(id(value))
            return self._keep(value, kind()) if known is None else known
        known = self._memo.get(id(value))
        if known is not None:
            return known
        for kinds, make in _MAKERS:
            if isinstance(value, kinds):
                return self._keep(value, make(self, value))
        return self._keep(value, self._object(value))

    def _keep(self, value: Any, made: Made) -> Made:
        self._memo[id(value)] = made
        self._kept.append(value)
        return made

    def _foreign(self, value: nn.Module) -> nn.Module:
        """A module that is none of the model's: its attributes are copied, its memory is shared."""
        before, self._make = self._make, _alias
        try:
            self._kept.append(value)
            self._reserve(value)
            self._fill(value)
        finally:
            self._make = before
        made: nn.Module = self._memo[id(value)]
        return made

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        made = self._keep(value, {} if type(value) is dict else _shallow(value))
        if made is value:
            return value
        items = [(self._copy(key), self._copy(item)) for key, item in list(value.items())]
        made.clear()
        for key, item in items:
            made[key] = item
        if type(value) is not dict:
            self._attributes(value, made)
        return made

    def _list(self, value: list[Any]) -> list[Any]:
        made = self._keep(value, [] if type(value) is list else _shallow(value))
        if made is not value:
            list.__setitem__(made, slice(None), [self._copy(item) for item in list.__iter__(value)])
        return made

    def _set(self, value: set[Any]) -> set[Any]:
        if all(type(item) in _ATOMIC for item in value):
            return _shallow(value)
        return type(value)([self._copy(item) for item in value])

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self._copy(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        if type(value) is tuple:
            return tuple(items)
        remake = getattr(type(value), "_make", None)
        return value if remake is None else remake(items)

    def _deque(self, value: Any) -> Any:
        made = self._keep(value, type(value)(maxlen=value.maxlen))
        made.extend(self._copy(item) for item in value)
        return made

    def _method(self, value: Any) -> Any:
        function, bound = self._copy(value.__func__), self._copy(value.__self__)
        if function is value.__func__ and bound is value.__self__:
            return value
        return types.MethodType(function, bound)

    def _partial(self, value: Any) -> Any:
        inner = self._copy(value.func)
        args, kwargs = self._copy(value.args), self._copy(value.keywords)
        made = type(value)(inner, *args, **kwargs)
        made.__dict__.update({k: self._copy(v) for k, v in vars(value).items()})
        return made

    def _reference(self, value: Any) -> Any:
        target = value()
        return weakref.ref(self._memo[id(target)]) if id(target) in self._own else value

    def _function(self, value: Any) -> Any:
        names = self._renamed(value)
        defaults = self._copy(value.__defaults__)
        named = self._copy(value.__kwdefaults__)
        changed = (value.__closure__, names, vars(value), named)
        if not any(changed) and defaults is value.__defaults__:
            return value
        closure = value.__closure__ or ()
        cells = tuple(
            self._memo.get(id(cell)) or self._keep(cell, types.CellType()) for cell in closure
        )
        space = self._namespace(value.__globals__, names) if names else value.__globals__
        made = types.FunctionType(value.__code__, space, value.__name__, defaults, cells or None)
        self._keep(value, made)
        made.__kwdefaults__ = named
        functools.update_wrapper(made, value, updated=())
        vars(made).pop("__wrapped__", None)
        vars(made).update({name: self._copy(item) for name, item in vars(value).items()})
        self._fill_cells(closure, cells)
        return made

    def _fill_cells(self, closure: Iterable[Any], cells: Iterable[Any]) -> None:
        """Last, since a function may close over itself."""
        for cell, new in zip(closure, cells, strict=True):
            if content_of(new) is UNSET and content_of(cell) is not UNSET:
                new.cell_contents = self._copy(cell.cell_contents)

    def _namespace(self, space: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = self._memo.get(id(space)) or self._keep(space, dict(space))
        for name, value in names.items():
            if made.get(name) is value:
                made[name] = self._copy(value)
        return made

    def _renamed(self, function: Any) -> dict[str, Any]:
        """The global variables of a function by which it comes to modules of the model."""
        return {
            name: value
            for name, value in globals_of(function)
            if self._reaches(value, function.__globals__, {id(function)})
        }

    def _reaches(self, value: Any, space: Any, seen: set[int]) -> bool:
        """Whether it is a module of the model, holds one, or is a helper that names one."""
        if isinstance(value, types.FunctionType):
            if id(value) in seen or value.__globals__ is not space:
                return False
            seen.add(id(value))
            return any(self._reaches(one, space, seen) for _, one in globals_of(value))
        held = list(value.values()) if type(value) is dict else value
        several: Any = held if isinstance(held, (list, tuple)) else (value,)
        return any(id(item) in self._own for item in several)

    def _object(self, value: Any) -> Any:
        """An object of some class with attributes; whatever can't be copied is shared."""
        package = type(value).__module__
        if package.startswith(_SHARED) or self._depth >= DEEPEST:
            return value
        slots = _slots_of(value)
        if not slots and not getattr(value, "__dict__", None):
            return value
        made = _shallow(value)
        if made is not value:
            self._keep(value, made)
            self._attributes(value, made)
            for name in slots:
                object.__setattr__(made, name, self._copy(getattr(value, name)))
        return made

    def _attributes(self, value: Any, made: Any) -> None:
        own = getattr(made, "__dict__", None)
        if own is not None and own is not vars(value):
            self._depth += 1
            try:
                own.update({n: self._copy(item) for n, item in list(vars(value).items())})
            finally:
                self._depth -= 1


_MAKERS: tuple[tuple[Any, Callable[[_Copier, Any], Any]], ...] = (
    (_ATOMS, lambda copier, value: value),
    (Tensor, lambda copier, value: copier._make(value, copier._memo)),
    (nn.Module, _Copier._foreign),
    (dict, _Copier._dict),
    (list, _Copier._list),
    (tuple, _Copier._tuple),
    (set, _Copier._set),
    (deque, _Copier._deque),
    (types.FunctionType, _Copier._function),
    (types.MethodType, _Copier._method),
    (functools.partial, _Copier._partial),
    (weakref.ReferenceType, _Copier._reference),
    (np.ndarray, lambda copier, value: value.copy()),
)


def globals_of(function: Any) -> Iterator[tuple[str, Any]]:
    """The global variables that the code of a function names, with their values."""
    space = function.__globals__
    for name in names_in(function.__code__):
        if name in space:
            yield name, space[name]


@functools.lru_cache(1 << 14)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function's code reads or writes, those of functions within it too."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in names_in(c)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _shallow(value: Made) -> Made:
    """A shallow copy; the thing itself where its class allows none."""
    try:
        made = copy.copy(value)
    except Exception:  # locks, streams, generators: a class may refuse with any error
        return value
    return made if type(made) is type(value) else value


def _slots_of(value: Any) -> list[str]:
    declared = (vars(kind).get("__slots__") or () for kind in type(value).__mro__)
    named = (name for own in declared for name in ([own] if isinstance(own, str) else own))
    return [n for n in named if n not in ("__dict__", "__weakref__") and hasattr(value, n)]


UNSET: Any = object()


def content_of(cell: types.CellType) -> Any:
    """The value of a closure's variable; ``UNSET`` before it is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return UNSET
