"""What a forward writes to outside of the model, and how it is put back.

A hook appends what it sees to a list, a function keeps a table in a dict of its module: these are
put back after every run that is none of the user's own (:class:`Outside`).

Fake tensors and traced integers get into whatever a forward writes to: a model that finds one
there answers wrongly.  Every one that is made leaves a weak reference (:class:`Watch`); afterwards
all of them have to be dead.
"""

from __future__ import annotations

import functools
import gc
import inspect
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prunus.tracer.copies import UNSET, content_of, globals_of, names_in
from prunus.tracer.follow import PLAIN
from prunus.tracer.provenance import Mark, Provenance

MOST = 2000
"""Functions that are followed from one model; there are some hundreds in a library."""

NESTED = 256
"""Containers with more items than this are put back, and what their items hold is not."""

_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
"""Types whose contents can be read and put back; a subclass may answer with something else."""

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made, which can be changed


class Outside:
    """The containers and variables outside of a model that its forward can name, as they are now.

    Found by following the functions that a forward, its hooks and its helpers name.

    Attributes
    ----------
    spaces
        Variables of the files in which these functions stand, by the id of the dict.
    memos
        Functions behind ``functools.lru_cache``.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.spaces: dict[int, dict[str, Any]] = {}
        self._variables: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._cells: list[tuple[types.CellType, Any]] = []
        self._classes: list[tuple[type, frozenset[str]]] = []
        self.memos: list[Any] = []
        seen: set[int] = set()
        for kind in {type(module) for module in modules}:
            self._enter_class(kind, seen)
        for module in modules:
            self._enter_instance(module, seen)

    def restore(self) -> None:
        """Put back what was set, added or removed since."""
        for kind, names in self._classes:
            for name in set(vars(kind)) - names:
                delattr(kind, name)
        for space, name, value in self._variables.values():
            present = _get(space, name)
            if present is not value:
                _set(space, name, value)
        for cell, value in self._cells:
            if value is not UNSET and content_of(cell) is not value:
                cell.cell_contents = value
        self._forget((FakeTensor, Provenance))
        for container, content in self._contents.values():
            restore_content(container, content)

    def forget_tensors(self) -> None:
        """Clear the caches of functions that hold tensors: a run makes the entries anew."""
        self._forget(Tensor)

    def _forget(self, kinds: Any) -> None:
        for cached in self.memos:
            held = gc.get_referents(cached)
            tables = [one for one in held if type(one) is dict]
            items = [item for table in tables for entry in table.items() for item in entry]
            if any(_has(item, kinds) for item in (*held, *items)):
                cached.cache_clear()

    def _enter_class(self, kind: type, seen: set[int]) -> None:
        for base in kind.__mro__:
            if _is_torch(base.__module__) or base is object or id(base) in seen:
                continue
            seen.add(id(base))
            for memo in self._attributes(base):
                self._enter(memo, kind, seen)
        self._enter(getattr(kind, "forward", None), kind, seen)

    def _attributes(self, kind: type) -> list[Any]:
        """Remember a class's own attributes that a forward may set; returns its memos."""
        self._classes.append((kind, frozenset(vars(kind))))
        memos = []
        for name, value in list(vars(kind).items()):
            if isinstance(value, LRU):
                memos.append(value)
            elif not name.startswith("__") and not isinstance(
                value, (types.FunctionType, *_DESCRIPTORS)
            ):
                self._variables[id(kind), name] = (kind, name, value)
                self._remember(value)
        return memos

    def _enter_instance(self, module: nn.Module, seen: set[int]) -> None:
        own = vars(module)
        for value in own.values():
            if type(value) not in PLAIN and isinstance(value, _FUNCTIONS):
                self._enter(value, type(module), seen)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in hooks.values():
                self._enter(hook, type(module), seen)

    def _enter(self, function: Any, kind: type, seen: set[int]) -> None:
        """Follow a function, and those that it names."""
        waiting = [(function, kind)]
        while waiting and len(seen) < MOST:
            value, owner = waiting.pop()
            if isinstance(value, LRU):
                self.memos.append(value)
            for inner in _unwrap(value):
                if id(inner) not in seen and not _is_torch(inner.__module__ or ""):
                    seen.add(id(inner))
                    waiting += self._named_by(inner, owner, seen)

    def _named_by(self, function: Any, owner: type, seen: set[int]) -> list[tuple[Any, type]]:
        """Remember what a function can write to; returns what it can call."""
        space = function.__globals__
        if id(space) not in self.spaces:
            self.spaces[id(space)] = dict(space)
        called: list[tuple[Any, type]] = []
        for item in _bound_to(function):
            self._remember(item)
            called += [(item, owner)] if callable(item) else []
        self._cells += [(cell, content_of(cell)) for cell in function.__closure__ or ()]
        for name, found in globals_of(function):
            called += self._class(found, seen)
            called += self._variable(space, name, found, owner)
        methods = (getattr(owner, name, None) for name in names_in(function.__code__))
        return called + [(one, owner) for one in methods if isinstance(one, (*_FUNCTIONS, LRU))]

    def _class(self, kind: Any, seen: set[int]) -> list[tuple[Any, type]]:
        """Of a class that a function names, in whose attributes it may keep something."""
        if not isinstance(kind, type) or id(kind) in seen:
            return []
        seen.add(id(kind))
        is_open = kind.__flags__ & _HEAP_TYPE
        if _is_torch(kind.__module__) or issubclass(kind, nn.Module) or not is_open:
            return []
        return [(memo, kind) for memo in self._attributes(kind)]

    def _variable(
        self, space: dict[str, Any], name: str, value: Any, owner: type
    ) -> list[tuple[Any, type]]:
        if isinstance(value, (*_FUNCTIONS, LRU)):
            return [(value, owner)]
        if isinstance(value, (type, types.ModuleType)):
            return []
        self._variables[id(space), name] = (space, name, value)
        self._remember(value)
        held = _values_of(value)
        if not isinstance(held, (list, tuple)) or len(held) > NESTED:
            return []
        return [(one, owner) for one in held if isinstance(one, (*_FUNCTIONS, LRU))]

    def _remember(self, value: Any, depth: int = 0) -> None:
        if id(value) in self._contents:
            return
        if type(value) in _CONTAINERS:
            content: Any = dict(value) if isinstance(value, dict) else list(value)
            self._contents[id(value)] = (value, content)
            searched = depth < 3 and len(value) <= NESTED and not isinstance(value, set)
            for item in _values_of(content) if searched else ():
                self._remember(item, depth + 1)
        elif depth < 2 and _is_plain_object(value):
            self._remember(vars(value), depth + 1)


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_DESCRIPTORS = (property, staticmethod, classmethod, type, types.BuiltinFunctionType)


def _is_torch(package: str) -> bool:
    return package.partition(".")[0] in ("torch", "builtins", "typing", "functools", "prunus")


def _is_plain_object(value: Any) -> bool:
    """Whether its attributes are data that a hook or a forward may set."""
    if isinstance(value, (nn.Module, Tensor, type, types.ModuleType, *_FUNCTIONS)):
        return False
    return type(getattr(value, "__dict__", None)) is dict and not _is_torch(type(value).__module__)


def _unwrap(value: Any) -> Iterator[Any]:
    """The Python functions behind a callable."""
    for _ in range(8):
        if isinstance(value, types.FunctionType):
            yield value
            value = vars(value).get("__wrapped__")
        elif isinstance(value, types.MethodType):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, LRU):
            value = value.__wrapped__
        else:
            break
    if not isinstance(value, (type, types.ModuleType, nn.Module)):
        called = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(called, types.FunctionType):
            yield called


def _bound_to(function: Any) -> Iterator[Any]:
    """What a function refers to beside its module's variables."""
    found = (content_of(cell) for cell in function.__closure__ or ())
    yield from (value for value in found if value is not UNSET)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if vars(function):
        yield vars(function)


def _values_of(container: Any) -> Any:
    return list(container.values()) if type(container) is dict else container


def restore_content(container: Any, content: Any) -> None:
    """Let a container hold the very same entries as before; it stays the same object."""
    if _ids_in(container) == _ids_in(content):
        return
    if isinstance(container, MutableSequence) and not isinstance(container, deque):
        container[:] = content
        return
    container.clear()
    (container.extend if isinstance(container, deque) else container.update)(content)


def _ids_in(container: Any) -> list[int]:
    values = container.values() if isinstance(container, dict) else ()
    return list(map(id, chain(container, values)))


def _get(space: Any, name: str) -> Any:
    return (space if isinstance(space, dict) else vars(space)).get(name, UNSET)


def _set(space: Any, name: str, value: Any) -> None:
    if isinstance(space, dict):
        space[name] = value
    else:
        setattr(space, name, value)


def _has(value: Any, kinds: Any) -> bool:
    """Whether it is of a kind, or a container that holds such a thing."""
    if isinstance(value, (tuple, list)):
        return any(_has(item, kinds) for item in value)
    if type(value) is dict:
        return any(_has(item, kinds) for item in value.values())
    return isinstance(value, kinds)


LRU: Any = type(functools.lru_cache(lambda: None))
"""The class of functions behind ``functools.lru_cache``."""

Spaces = Mapping[int, Mapping[str, Any]]

ROUNDS = 4
"""How often survivors are taken out of what holds them, before a trace is given up."""


class Watch:
    """Weak references to what has to die."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Any]] = []

    def add(self, made: Any) -> None:
        """Watch one object; of a traced integer its mark: integers have no weak references."""
        self._made.append(weakref.ref(made))

    def is_clean(self) -> bool:
        """Whether everything that was watched is dead."""
        return all(reference() is None for reference in self._made)

    def settle(self, before: Spaces | None = None, *, failed: bool = False) -> bool:
        """Take survivors out of whatever holds them; whether all is dead then.

        Parameters
        ----------
        before
            The id of a dict → what it held, which is put back in the place of a survivor.
        failed
            An error is on its way, whose traceback keeps what its frames hold.
        """
        for _ in range(ROUNDS):
            if self.is_clean():
                return True
            gc.collect(0)  # cycles: what a trace makes is new, since nothing is collected meanwhile
            if self.is_clean():
                return True
            if not _release(self._survivors(), before or {}, frames=not failed) or failed:
                break
        if not (failed or self.is_clean()):
            gc.collect()
        return self.is_clean()

    def _survivors(self) -> list[Any]:
        alive = [made for one in self._made if (made := one()) is not None]
        marks = {id(made) for made in alive if isinstance(made, Mark)}
        survivors = [made for made in alive if not isinstance(made, Mark)]
        return survivors + _integers_of(marks) if marks else survivors


def _integers_of(marks: set[int]) -> list[Any]:
    """Traced integers by the ids of their marks."""
    every = gc.get_objects()
    return [one for one in every if type(one) is Provenance and id(one.mark) in marks]


def _release(survivors: list[Any], before: Spaces, *, frames: bool) -> bool:
    """Remove survivors from the containers that hold them; whether anything was removed."""
    level, removed = survivors, False
    ours = {id(survivors)}
    while level and not removed:
        targets = set(map(id, level))
        holders = gc.get_referrers(*level)
        ours |= {id(level), id(holders)}
        owners = _owners(holders)
        skipped = () if frames else types.FrameType
        others = [one for one in holders if id(one) not in ours and not isinstance(one, skipped)]
        for holder in others:
            was = before.get(id(holder), {})
            removed |= _remove(holder, targets, was, owners.get(id(holder)))
        ours.add(id(others))
        level = [one for one in others if isinstance(one, (tuple, frozenset))]
    return removed


def _remove(holder: Any, targets: set[int], was: Mapping[str, Any], owner: Any) -> bool:
    """Take targets out of what holds them; whether any was in there."""
    if isinstance(holder, MutableMapping):
        return _forget(holder, targets, was, owner)
    if isinstance(holder, (MutableSequence, set)):
        kept = [item for item in holder if id(item) not in targets]
        if len(kept) == len(holder):
            return False
        restore_content(holder, kept)
    elif isinstance(holder, LRU):
        holder.cache_clear()
    elif isinstance(holder, types.CellType):
        del holder.cell_contents
    elif isinstance(holder, types.FrameType):
        try:  # it lives on where a module that it imported has kept its traceback
            holder.clear()
        except RuntimeError:  # it still runs
            return False
    else:
        return False
    return True


def _owners(holders: list[Any]) -> dict[int, Any]:
    """The id of a dict → the class whose attributes it is, or the unbounded cache."""
    dicts = [holder for holder in holders if type(holder) is dict]
    owners = [one for one in gc.get_referrers(*dicts) if isinstance(one, (type, LRU))]
    return {id(held): owner for owner in owners for held in gc.get_referents(owner)}


def _forget(holder: Any, targets: set[int], was: Mapping[str, Any], owner: Any) -> bool:
    keys = [k for k, v in list(holder.items()) if id(k) in targets or id(v) in targets]
    for key in keys:
        if key in was and id(was[key]) not in targets:
            holder[key] = was[key]
        elif isinstance(owner, type):
            delattr(owner, key)  # classes remember what they have looked up
        elif isinstance(owner, LRU):
            owner.cache_clear()
        else:
            holder.pop(key, None)
    return bool(keys)
