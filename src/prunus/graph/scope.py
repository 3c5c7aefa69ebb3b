"""Scopes: which modules and tensors a glob names, whatever lies inside them included."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate

from prunus.errors import BudgetError

IN = " in "
"""Between the name of a cost and the scope in which it is counted: ``"macs in layer3.*"``."""

_NEAR = 3
"""How many near names an error lists."""


def is_inside(name: str, scope: str) -> bool:
    """Whether a glob fits the name or that of a module around it.

    >>> is_inside("layer3.0.conv1.weight", "layer?"), is_inside("layer3.0.conv1", "layer3.*")
    (True, True)
    """
    around = accumulate(name.split("."), lambda a, b: f"{a}.{b}")
    return any(fnmatchcase(one, scope) for one in around)


def find_inside(
    names: Collection[str], scope: str, aliases: Mapping[str, str], cost: str
) -> list[str]:
    """The names inside a scope; tied tensors by each of their names.

    Raises
    ------
    BudgetError
        If there are none; it names the ``cost`` that was to be counted.
    """
    tied: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        tied.setdefault(first, []).append(alias)
    found = [
        name for name in names if any(is_inside(one, scope) for one in (name, *tied.get(name, ())))
    ]
    if found:
        return found
    near = difflib.get_close_matches(scope, names, n=_NEAR, cutoff=0.3) or list(names)[:_NEAR]
    raise BudgetError(
        f"the scope {scope!r} matches nothing that has {cost}",
        why=f"{cost} are counted in {', '.join(map(repr, near))} and others" if near else "",
        fix="give a glob over paths of modules or names of tensors: 'layer3' or 'layer3.*', say",
    )
