"""Configs and lists that are to be edited become the model's own: two models may share them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from prunus.errors import ApplyError
from prunus.plans import Edit
from prunus.surgeon.reach import holders_of
from prunus.tracer.provenance import is_config

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_DEEPEST = 6


def own_copies(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Replace every object that edits write into by a copy, in all modules that hold it.

    Objects that hold it are copied as well.  Modules are the model's own, and stay.

    Raises
    ------
    ApplyError
        If an edit would write into an object that the model only reaches, and does not hold: that
        of a property, or a variable of a Python module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [(edit, modules[edit.module]) for edit in edits if edit.module in modules]
    written: dict[int, Any] = {}
    for edit, module in inside:
        holders = holders_of(module, edit.attribute)[1:]
        written.update((id(h), h) for h in holders if not isinstance(h, (tuple, nn.Module)))
    if not written:
        return
    _Copies(written).replace_in(model)
    for edit, module in inside:
        if any(id(holder) in written for holder in holders_of(module, edit.attribute)[1:]):
            raise ApplyError(
                f"{edit.module}.{edit.attribute} is in an object that the model does not hold",
                where=edit.module,
                why="changing it would change every model that reads it",
                fix="keep the object in an attribute of the module",
            )


def own_copies_of_configs(model: nn.Module) -> None:
    """Replace every config that modules hold by a copy."""
    configs: dict[int, Any] = {}

    def find(value: Any, depth: int) -> None:
        if is_config(value) and id(value) not in configs and depth < _DEEPEST:
            configs[id(value)] = value
            for item in vars(value).values():
                find(item, depth + 1)

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                find(value, 0)
    _Copies(configs).replace_in(model)


class _Copies:
    """Copies of objects, and of all that holds them, made as they are met."""

    def __init__(self, wanted: dict[int, Any]) -> None:
        self._wanted = wanted
        self._made: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}  # alive, so that no other object gets its id

    def replace_in(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if name not in _OF_EVERY_MODULE:
                    later = self._of(value, 0)
                    if later is not value:
                        vars(module)[name] = later

    def _of(self, value: Any, depth: int) -> Any:
        """The object itself, or a copy where it is written into or holds what is."""
        if id(value) in self._made:
            return self._made[id(value)]
        holds = isinstance(value, (dict, list, tuple)) or is_config(value)
        if not holds or id(value) in self._kept or depth > _DEEPEST:
            return value
        self._kept[id(value)] = value
        if id(value) in self._wanted:  # first, as what it holds may point back at it
            self._made[id(value)] = _copy_of(value)
        later = {key: self._of(item, depth + 1) for key, item in _items(value)}
        changed = {key: later[key] for key, item in _items(value) if later[key] is not item}
        if not changed:
            return self._made.get(id(value), value)
        if isinstance(value, tuple):
            items = [changed.get(key, item) for key, item in enumerate(value)]
            made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            return self._made.setdefault(id(value), made)
        made = self._made.setdefault(id(value), _copy_of(value))
        entries = made if isinstance(made, (dict, list)) else vars(made)
        for key, new in changed.items():
            entries[key] = new
        return made


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
