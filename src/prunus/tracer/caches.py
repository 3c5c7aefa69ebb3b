"""Tensors that modules remember from one forward to the next, and that a cut makes stale.

An attention bias gathered once and kept in a dict is no state of the model: the forward makes
it anew when it is missing.  So it is taken away while tracing, and again when a plan is applied.
A dict of constants looks the same from outside; what the forward does without an entry tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunus.graph.program import modules_in

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

Attributes = list[tuple[str, nn.Module, dict[str, Any]]]
"""Path, module, and what :func:`remember_attributes` saw of it."""

Entries = dict[str, list[Any]]
"""``"path.of.module:attribute"`` → keys of a dict."""


def find_remembered(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Entries, Entries]:
    """Which entries of the modules' dicts of tensors a forward makes anew, and which it does not.

    Parameters
    ----------
    model
        A copy of the model, which is used up: its forward runs on dicts that seem to be empty.
    run
        Runs the forward of the copy.

    Returns
    -------
    remembered
        Entries that came back bit-equal, and those of the same dict that were not asked for.
    constant
        All others: of dicts that the forward only reads, and those that it can't do without.
    """
    probes: dict[str, _Probe] = {}
    by_id: dict[int, _Probe] = {}
    for path, module in modules_in(model):
        for name, value in vars(module).items():
            if is_table(name, value):
                probe = by_id.setdefault(id(value), _Probe(value))
                probes[f"{path}:{name}"] = vars(module)[name] = probe
    with suppress(Exception):  # a forward may raise anything where it misses a constant
        run(model)
    remembered = {at: probe.remembered() for at, probe in probes.items()}
    return (
        {at: keys for at, keys in remembered.items() if keys},
        {
            at: [key for key in probe.before if key not in remembered[at]]
            for at, probe in probes.items()
        },
    )


def has_tables(model: nn.Module) -> bool:
    """Whether any module keeps a plain dict of tensors that is not empty."""
    return any(
        type(value) is dict and is_table(name, value)
        for module in model.modules()
        for name, value in vars(module).items()
    )


def forget(model: nn.Module, entries: Mapping[str, Iterable[Any]]) -> None:
    """Remove entries from the modules' dicts, in place."""
    modules = dict(modules_in(model)) if entries else {}
    for at, keys in entries.items():
        path, _, name = at.rpartition(":")
        kept = vars(modules[path]).get(name, {})
        for key in keys:
            kept.pop(key, None)


def find_caches(before: Attributes) -> list[str]:
    """What a forward has put into dicts of tensors, and attributes that it has set from None.

    Parameters
    ----------
    before
        What :func:`remember_attributes` saw before the forward.

    Returns
    -------
    list of str
        ``"path.of.module:attribute"``, and for each entry of such a dict that was there before,
        which is a constant, ``"path.of.module:attribute!'key'"``.
    """
    return list(_filled(before))


def find_written(before: Attributes) -> list[str]:
    """Names of the tensor attributes that a forward has assigned: it makes them, they are no state.

    Parameters
    ----------
    before
        What :func:`remember_attributes` saw before the forward.
    """
    return [
        f"{path}.{name}" if path else name
        for path, module, old in before
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value is not old.get(name)
    ]


def remember_attributes(model: nn.Module) -> Attributes:
    """Path, module and attributes of every module; of dicts a copy."""
    return [
        (path, module, {n: dict(v) if type(v) is dict else v for n, v in vars(module).items()})
        for path, module in modules_in(model)
    ]


def drop_caches(model: nn.Module, names: Sequence[str]) -> None:
    """Empty the dicts of tensors but for constants, and reset the tensor attributes, in place.

    The names may be a stranger's: nothing that PyTorch keeps on a module itself is among them.
    """
    modules = {path: vars(module) for path, module in modules_in(model)}
    constant = {text for text in names if any(text.startswith(f"{at}!") for at in names)}
    for text in sorted(set(names) - constant):
        path, _, name = text.rpartition(":")
        own = modules.get(path, {})
        kept: Any = own.get(name)
        if is_table(name, kept):
            _keep_constants(text, kept, constant)
        elif name not in _OF_EVERY_MODULE and isinstance(kept, Tensor):
            own[name] = None


def _keep_constants(at: str, table: dict[Any, Any], constant: set[str]) -> None:
    for key in [key for key in table if f"{at}!{key!r}" not in constant]:
        del table[key]


def is_table(name: str, value: Any) -> bool:
    """Whether an attribute is a plain dict that holds tensors, and nothing else."""
    return (
        type(value) is dict
        and len(value) > 0
        and name not in _OF_EVERY_MODULE
        and all(isinstance(item, Tensor) for item in value.values())
    )


def _filled(before: Attributes) -> Iterator[str]:
    for path, module, old in before:
        for name, value in vars(module).items():
            at = f"{path}:{name}"
            if isinstance(value, Tensor) and name in old and old[name] is None:
                yield at
            elif type(value) is dict and is_table(name, value):
                yield from _filled_table(at, value, old.get(name))


def _filled_table(at: str, table: dict[Any, Any], held: Any) -> Iterator[str]:
    constant = held if isinstance(held, dict) else {}
    if any(constant.get(key) is not item for key, item in table.items()):
        yield at
        yield from (f"{at}!{key!r}" for key in constant)


class _Probe(dict[Any, Any]):
    """A dict of tensors that seems to be empty until it is filled.

    What is asked for outright, and would be missing, is answered from what was there before.
    """

    def __init__(self, before: Mapping[Any, Tensor]) -> None:
        super().__init__()
        self.before = dict(before)
        self._asked: set[Any] = set()

    def remembered(self) -> list[Any]:
        """The keys that were there before and have come back with the same values."""
        back = [key for key in self.before if _equal(dict.get(self, key), self.before[key])]
        if not back:
            return []
        return [key for key in self.before if key in back or key not in self._asked]

    def __contains__(self, key: Any) -> bool:
        self._asked.add(key)
        return dict.__contains__(self, key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._asked.add(key)
        return dict.get(self, key, default)

    def __missing__(self, key: Any) -> Any:
        self._asked.add(key)
        return self.before[key]

    def __iter__(self) -> Iterator[Any]:
        self._asked.update(self.before)
        return dict.__iter__(self)

    def keys(self) -> Any:
        self._asked.update(self.before)
        return dict.keys(self)

    def values(self) -> Any:
        self._asked.update(self.before)
        return dict.values(self)

    def items(self) -> Any:
        self._asked.update(self.before)
        return dict.items(self)


def _equal(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.detach(), b.detach())
