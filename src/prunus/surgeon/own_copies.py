"""Configs and lists that are to be edited become the model's own: two models may share them."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Set
from typing import Any

from torch import nn

from prunus.errors import ApplyError
from prunus.graph.plans import Edit
from prunus.surgeon.reach import OF_EVERY_MODULE, holders_of
from prunus.tracer.follow import is_config


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
            later[id(value)] = (
                type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            )
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
