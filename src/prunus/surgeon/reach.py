"""The attributes of a model that a plan may read and set, and no others.

A path starts at an entry of the module's own ``__dict__`` that PyTorch doesn't keep there itself,
and leads through lists, tuples, dicts and plain settings objects (configs).  Nothing on the way is
called: no property, no ``__getattr__``, no ``__setattr__``; classes, functions, modules, loggers
and tensors are nobody's settings.  Objects that are to be edited become the model's own first: two
models may share a config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Mapping, Set
from typing import Any

from torch import nn

from prunus.errors import ApplyError
from prunus.graph.plan_records import CLASS, Edit, check_kind
from prunus.surgeon.optimizer_state import like
from prunus.tracer.adapters import become, kind_of
from prunus.tracer.follow import is_config

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""What PyTorch keeps in the ``__dict__`` of a module: its tensors, children, hooks and mode."""

_PLAIN = (bool, int, float, str, tuple)
"""What is compared with a plan's values: tensors and arrays compare element by element."""


def read_attribute(module: nn.Module, path: str) -> Any:
    """The value at ``"name"``, ``"name[1]"`` or ``"name.key"``; AttributeError if there is none."""
    if path == CLASS:
        return kind_of(module)
    return _walk(module, _keys(path))[-1]


def holders_of(module: nn.Module, path: str) -> list[Any]:
    """The module, and the objects on the way to what :func:`read_attribute` reads."""
    return [module] if path == CLASS else _walk(module, _keys(path))[:-1]


def write_attribute(module: nn.Module, path: str, value: Any) -> None:
    """Set what :func:`read_attribute` reads; tuples on the way are rebuilt."""
    if path == CLASS:
        become(module, value)
        return
    keys = _keys(path)
    *holders, old = _walk(module, keys)
    if isinstance(old, (list, tuple)):
        value = type(old)(value)
    for holder, key in zip(reversed(holders), reversed(keys), strict=True):
        if isinstance(holder, tuple):
            index = int(key)
            value = type(holder)((*holder[:index], value, *holder[index + 1 :]))
            continue
        if isinstance(holder, list):
            holder[int(key)] = value
        else:
            own = holder if isinstance(holder, dict) else vars(holder)
            own[_own_key(own, key)] = value
        return


def value_of(module: nn.Module | None, path: str) -> Any:
    """What a plan's value is compared with: a tuple for a list, None for what no plan speaks of."""
    try:
        value = None if module is None else read_attribute(module, path)
    except AttributeError:
        return None
    value = tuple(value) if isinstance(value, (list, tuple)) else value
    return value if type(value) in _PLAIN else None


def check_edit(edit: Edit, module: nn.Module | None) -> None:
    """Refuse what is none of the edits of a plan, or not of this module as it is.

    Raises
    ------
    PlanError
        If a plan may not do that.
    ApplyError
        If the module has another value there.
    """
    where = f"{edit.module}.{edit.attribute}".lstrip(".")
    check_kind(where, edit.attribute, edit.before, edit.after)
    value = value_of(module, edit.attribute)
    nested = edit.attribute != "use_nested_tensor" or isinstance(module, nn.TransformerEncoder)
    if type(value) is not type(edit.before) or value != edit.before or not nested:
        raise ApplyError(
            f"{edit.module}.{edit.attribute} is {value!r}, the plan expects {edit.before!r}",
            where=edit.module,
            why="the plan was made for another model, or the model was changed since",
            fix="trace and plan the model as it is now",
        )


def _keys(path: str) -> list[int | str]:
    return [int(k) if k.isdecimal() and len(k) < 10 else k for k in re.findall(r"[^.\[\]]+", path)]


def _walk(module: nn.Module, keys: list[int | str]) -> list[Any]:
    """The module, all that lies on the way, and the value at its end."""
    name = keys[0] if keys else ""
    if not isinstance(name, str) or name.startswith("_") or name in OF_EVERY_MODULE:
        raise AttributeError(name)
    found: list[Any] = [module]
    for key in keys:
        found.append(_step(found[-1], key))
    return found


def _step(holder: Any, key: int | str) -> Any:
    """One entry of a container or of a settings object, found without running any code of it."""
    try:
        if type(holder) in (list, tuple) or _is_size(holder):
            return holder[int(key)]
        if isinstance(holder, nn.Module) or is_config(holder):
            own: Mapping[Any, Any] = vars(holder)
            if str(key).startswith("_"):
                raise KeyError(key)
            return own[str(key)]
        if type(holder) is dict:
            return holder[_own_key(holder, key)]
    except (KeyError, IndexError, ValueError) as error:
        raise AttributeError(str(key)) from error
    raise AttributeError(str(key))


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and type(value).__module__ == "torch"


def _own_key(holder: Mapping[Any, Any], key: int | str) -> Any:
    return key if key in holder else str(key)


def own_copies(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Replace every object that edits write into by a copy, in all modules that hold it.

    Objects that hold it are copied as well.  Modules are the model's own, and stay.

    Raises
    ------
    ApplyError
        If such an object can't be copied.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [(edit, modules[edit.module]) for edit in edits if edit.module in modules]
    written: dict[int, Any] = {}
    for edit, module in inside:
        holders = holders_of(module, edit.attribute)[1:]
        written.update((id(h), h) for h in holders if not isinstance(h, (tuple, nn.Module)))
    if not written:
        return
    _Held(model).replace(written)
    for edit, module in inside:
        if any(id(holder) in written for holder in holders_of(module, edit.attribute)[1:]):
            raise ApplyError(
                f"{edit.module}.{edit.attribute} is in an object that can't be copied",
                where=edit.module,
                why="another model may hold it as well, and would change with it",
                fix="keep the number in an attribute of the module, or let copy.copy() work",
            )


def own_dicts(model: nn.Module, written: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Attribute dicts to write into instead of those of objects that the model may share.

    Returns
    -------
    dict
        By the ids of the dicts that were given; attributes of modules are not among them.
    """
    held = _Held(model)
    ids = {id(attributes) for attributes in written}
    objects = [key for key, value in held.known.items() if id(_attributes(value)) in ids]
    later = held.replace(objects)
    return {id(_attributes(held.known[key])): vars(later[key]) for key in objects}


def _attributes(value: Any) -> Any:
    return getattr(value, "__dict__", None)


class _Held:
    """Configs, dicts, lists and tuples that modules hold, and those that are in them."""

    def __init__(self, model: nn.Module) -> None:
        self._stores = [vars(module) for module in model.modules()]
        self.known: dict[int, Any] = {}
        self._holders: dict[int, set[int]] = {}
        waiting = [
            item
            for store in self._stores
            for name, item in store.items()
            if name not in OF_EVERY_MODULE
        ]
        for value in waiting:
            if not _holds(value) or id(value) in self.known:
                continue
            self.known[id(value)] = value
            for _, item in _items(value):
                if _holds(item):
                    self._holders.setdefault(id(item), set()).add(id(value))
                    waiting.append(item)

    def replace(self, wanted: Iterable[int]) -> dict[int, Any]:
        """Put copies in the place of some, by their ids, and of all that holds them; the copies."""
        waiting = [key for key in wanted if key in self.known]
        copied = set(waiting)
        for key in waiting:
            waiting += self._holders.get(key, set()) - copied
            copied |= self._holders.get(key, set())
        later = {
            key: _copy_of(self.known[key])
            for key in copied
            if not isinstance(self.known[key], tuple)
        }
        for made in list(later.values()):
            self._refer(made if isinstance(made, (dict, list)) else vars(made), copied, later)
        for store in self._stores:
            self._refer(store, copied, later, OF_EVERY_MODULE)
        return later

    def _refer(
        self, holder: Any, copied: Set[int], later: dict[int, Any], but: Container[str] = ()
    ) -> None:
        """Let the entries of a holder be the copies of what they are."""
        for name, item in _items(holder):
            if id(item) in copied and name not in but:
                holder[name] = self._replaced(item, copied, later)

    def _replaced(self, value: Any, copied: Set[int], later: dict[int, Any]) -> Any:
        if id(value) in copied and id(value) not in later:  # a tuple, of which no cycle consists
            items = [self._replaced(item, copied, later) for item in value]
            later[id(value)] = like(value, items)
        return later.get(id(value), value)


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple)) or is_config(value)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return list(vars(value).items())


def _copy_of(value: Any) -> Any:
    """A copy that holds the same objects; the object itself where it can't be copied."""
    try:
        made = copy.copy(value)
    except Exception:  # a class may refuse with any error; then the object is not written either
        return value
    if type(made) is not type(value):
        return value
    if getattr(value, "__dict__", None) is value:  # a dict whose entries are its attributes
        object.__setattr__(made, "__dict__", made)
    return made
