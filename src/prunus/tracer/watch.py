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
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any

from prunus.tracer.marks import Mark
from prunus.tracer.provenance import Provenance

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
    if isinstance(holder, (dict, MutableMapping)):
        return _forget(holder, targets, was, owner)
    remove = next((act for kinds, act in _REMOVERS if isinstance(holder, kinds)), None)
    return remove is not None and remove(holder, targets)


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
    ((list, deque, MutableSequence), _drop),
    (set, _discard),
    (types.CellType, _empty),
    (types.FrameType, _finish),
)
