"""What modules hold beside their tensors is what it was, but for what the plan edits.

A forward in eval mode reads neither a dropout's ``p`` nor a batch norm's ``momentum``, and does not
show that a hook is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunus.graph.plan_json import CLASS
from prunus.verifier.case import Case

_HOOKS = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules")
)
_PLAIN = (bool, int, float, str, type(None))
_LOST = object()


def other_attributes(case: Case) -> str:
    """A module, attribute or hook that differs and is in no edit of the plan; empty if none."""
    before = dict(case.original.named_modules(remove_duplicate=False))
    after = dict(case.pruned.named_modules(remove_duplicate=False))
    for path in (*before, *after):
        if path not in before or path not in after:
            return f"{path}: one of the models has no such module"
    edited: dict[int, set[str]] = {}  # by module: one may have several paths
    shared: dict[int, Any] = {}
    for edit in case.plan.edits:
        if edit.module not in before:
            continue
        module, name = before[edit.module], _root(edit.attribute)
        edited.setdefault(id(module), set()).add(edit.attribute)
        if name in vars(module):
            _pair_lists(vars(module)[name], vars(after[edit.module]).get(name), shared)
    pruned: dict[int, nn.Module] = {}
    for path, module in before.items():
        if pruned.setdefault(id(module), after[path]) is not after[path]:
            return f"{path}: it was one module under several names, and is so no more"
        reason = _differs(module, after[path], edited.get(id(module), set()), shared)
        if reason:
            return f"{path or 'the model'}: {reason}"
    return ""


def _root(edit: str) -> str:
    """The attribute of the module that an edit is in.

    >>> _root("config[1].heads")
    'config'
    """
    return edit.partition(".")[0].partition("[")[0]


def _pair_lists(before: Any, after: Any, found: dict[int, Any]) -> None:
    """What became of lists in an edited attribute, by id: other modules may hold the same ones."""
    if isinstance(before, (list, tuple)) and type(before) is type(after):
        if isinstance(before, list):
            found[id(before)] = after
        for one, other in zip(before, after, strict=False):
            _pair_lists(one, other, found)


def _differs(
    before: nn.Module, after: nn.Module, edits: set[str], shared: Mapping[int, Any]
) -> str:
    if isinstance(before, torch.jit.ScriptModule):
        return ""  # copies are of another class, and nothing edits its attributes
    if type(before) is not type(after) and CLASS not in edits:
        return f"it is a {type(after).__name__}, and was a {type(before).__name__}"
    had, has = vars(before), vars(after)
    if set(had["_non_persistent_buffers_set"]) != set(has["_non_persistent_buffers_set"]):
        return "other buffers are left out of its state_dict"
    for name in _HOOKS:
        if list(map(_kind, had[name].values())) != list(map(_kind, has[name].values())):
            return f"its {name} are others than they were"
    changed = set(map(_root, edits))
    for name, value in had.items():
        if name in changed or name in _HOOKS or not _is_plain(value):
            continue
        found = has.get(name, _LOST)
        if found is _LOST:
            return f"it has lost {name}, which was {value!r}"
        if id(value) in shared and found is shared[id(value)]:
            continue  # the very list that was edited
        if not _same(value, found):
            return f"{name} is {found!r}, and was {value!r}; the plan does not edit it"
    return ""


def _kind(hook: Any) -> Any:
    return getattr(hook, "__qualname__", type(hook))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))
