"""Watch what a trace makes, and see to it that none of it outlives the trace.

Fake tensors and traced integers get into whatever a forward writes to: a list that a hook fills,
a dict of the module's file, ``functools.lru_cache``.  A model that finds one there answers wrongly.
Every one that is made leaves a weak reference here; afterwards all of them have to be dead.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

from prunus.tracer.marks import Mark
from prunus.tracer.provenance import Provenance

LRU: Any = type(functools.lru_cache(lambda: None))
"""The class of functions behind ``functools.lru_cache``."""

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

    def settle(self) -> bool:
        """Take survivors out of whatever holds them; whether all is dead then."""
        if self.is_clean():
            return True
        for generation in (0, 2):  # cycles among what is new, then among all there is
            gc.collect(generation)
            if self.is_clean():
                return True
        for _ in range(ROUNDS):
            if not _release(self._survivors()):
                break
            gc.collect(0)
            if self.is_clean():
                return True
        gc.collect()
        return self.is_clean()

    def _survivors(self) -> list[Any]:
        alive = [made for one in self._made if (made := one()) is not None]
        marks = {id(made) for made in alive if isinstance(made, Mark)}
        survivors = [made for made in alive if not isinstance(made, Mark)]
        if marks:
            for one in gc.get_objects():
                if type(one) is Provenance and id(one.mark) in marks:
                    survivors.append(one)
        return survivors


def _release(survivors: list[Any]) -> bool:
    """Remove survivors from the containers that hold them; whether anything was removed."""
    level, removed = survivors, False
    ours = {id(survivors)}
    while level and not removed:
        targets = {id(one) for one in level}
        holders = gc.get_referrers(*level)
        ours |= {id(level), id(holders)}
        above = []
        for holder in holders:
            if id(holder) in ours:
                continue
            remove = next((act for kinds, act in _REMOVERS if isinstance(holder, kinds)), None)
            if remove is not None:
                removed |= remove(holder, targets)
            elif isinstance(holder, (tuple, frozenset)):
                above.append(holder)
        level = above
    return removed


def _forget(holder: Any, targets: set[int]) -> bool:
    owners = gc.get_referrers(holder)
    unbounded = [one for one in owners if isinstance(one, LRU)]
    for cached in unbounded:  # which keep their entries in a dict
        cached.cache_clear()
    keys = [k for k, v in list(holder.items()) if id(k) in targets or id(v) in targets]
    kind = next((one for one in owners if isinstance(one, type)), None)
    for key in keys:
        if kind is not None and key in vars(kind):
            delattr(kind, key)  # classes remember what they have looked up
        else:
            holder.pop(key, None)
    return bool(keys or unbounded)


def _drop(holder: Any, targets: set[int]) -> bool:
    kept = [item for item in holder if id(item) not in targets]
    fewer = len(kept) < len(holder)
    if fewer and isinstance(holder, deque):
        holder.clear()
        holder.extend(kept)
    elif fewer:
        holder[:] = kept
    return fewer


def _discard(holder: Any, targets: set[int]) -> bool:
    gone = [item for item in holder if id(item) in targets]
    for item in gone:
        holder.discard(item)
    return bool(gone)


def _clear(holder: Any, targets: set[int]) -> bool:
    holder.cache_clear()
    return True


def _empty(holder: Any, targets: set[int]) -> bool:
    del holder.cell_contents
    return True


def _finish(holder: Any, targets: set[int]) -> bool:
    """A frame that has run lives on where a module that it imported has kept its traceback."""
    try:
        holder.clear()
    except RuntimeError:  # it still runs
        return False
    return True


_REMOVERS: tuple[tuple[Any, Callable[[Any, set[int]], bool]], ...] = (
    (LRU, _clear),
    ((dict, MutableMapping), _forget),
    ((list, deque, MutableSequence), _drop),
    (set, _discard),
    (types.CellType, _empty),
    (types.FrameType, _finish),
)
