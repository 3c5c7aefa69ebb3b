"""The attributes of a model that a plan may read and set, and no others.

A path starts at an entry of the module's own ``__dict__`` that PyTorch doesn't keep there itself,
and leads through lists, tuples, dicts and plain settings objects (configs).  Nothing on the way is
called: no property, no ``__getattr__``, no ``__setattr__``; classes, functions, modules, loggers
and tensors are nobody's settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunus.errors import ApplyError
from prunus.graph.plan_json import CLASS, check_kind
from prunus.graph.plans import Edit
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
