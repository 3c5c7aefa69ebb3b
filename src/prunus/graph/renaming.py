"""Names of modules and tensors before and after blocks are dropped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class Renaming:
    """What everything is called once the modules of the given paths are gone.

    Children that are called by their place close up, as those of a list do; others keep their
    names.

    Examples
    --------
    >>> names = Renaming(["layers.1", "layers.2"])
    >>> names.after("layers.3.weight"), names.after("layers.2.weight"), names.after("head.weight")
    ('layers.1.weight', None, 'head.weight')
    >>> names.before("layers.1.weight")
    'layers.3.weight'
    """

    def __init__(self, dropped: Iterable[str]) -> None:
        self._gone: dict[str, set[str]] = {}
        for name in dropped:
            container, _, key = name.rpartition(".")
            self._gone.setdefault(container, set()).add(key)
        self._places = {
            container: sorted(int(key) for key in keys if _is_place(key))
            for container, keys in self._gone.items()
        }

    def after(self, name: str) -> str | None:
        """The later name of what was called so; None for what is gone."""
        old: list[str] = []
        new: list[str] = []
        for part in name.split("."):
            container = ".".join(old)
            if part in self._gone.get(container, ()):
                return None
            old.append(part)
            places = self._places.get(container)
            if places and _is_place(part):
                part = str(int(part) - bisect_left(places, int(part)))
            new.append(part)
        return ".".join(new)

    def left_of(self, entries: Mapping[str, Value]) -> dict[str, Value]:
        """The entries that are not gone, under their later names."""
        later = ((self.after(name), value) for name, value in entries.items())
        return {name: value for name, value in later if name is not None}

    def before(self, name: str) -> str:
        """The name that was, of what is called so now."""
        old: list[str] = []
        for part in name.split("."):
            places = self._places.get(".".join(old))
            if places and _is_place(part):
                index = int(part)
                for place in places:
                    index += place <= index
                part = str(index)
            old.append(part)
        return ".".join(old)


def _is_place(key: str) -> bool:
    """Whether a child is called by a number; those of more digits are names like any other."""
    return len(key) < 10 and key.isdecimal()
