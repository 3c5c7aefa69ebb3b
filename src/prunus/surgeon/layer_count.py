"""Which integers and lists beside a list of layers say how many it has, and what they are.

A config says so under a name that differs from library to library.  Where the module can be built
from its config alone, that decides: built again from a config with another number, it has to have
the tensors that are left.  Elsewhere names have to do.  (Of 203 lists of layers in 132 models of
transformers 5, names alone find something else for 83: the numbers of other towers, mostly.)
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn

from prunus.graph.plan_records import Renaming
from prunus.tracer.follow import is_config
from prunus.tracer.precision import same_draws

_TELLING = re.compile(r"layer|depth|block", re.IGNORECASE)
"""Names under which numbers of layers, and what holds for each of them, are kept."""

_LISTS = (nn.ModuleList, nn.Sequential)

_MOST_BUILDS = 12
"""How many configs are tried before names have to do."""

Keys = tuple[str, ...]
"""The way to an entry of a config, through configs in it."""


@dataclass(frozen=True)
class _Entry:
    """An entry of a config, or an item of a list there (layers of each stage)."""

    at: Keys
    key: str
    item: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """An entry of an attribute dict, and its later value."""

    holder: dict[str, Any]
    key: str
    value: Any


@dataclass(frozen=True)
class _Stack:
    """The children of ``path`` that go, by place and by key; the path is relative to an owner."""

    path: str
    container: nn.Module
    gone: tuple[int, ...]
    keys: tuple[str, ...]

    @property
    def length(self) -> int:
        return len(self.container._modules)

    def shapes_after(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Shapes of tensors by name, with the layers gone."""
        return Renaming(f"{self.path}.{key}" for key in self.keys).left_of(shapes)

    def counted_by(self, value: Any) -> bool:
        """Whether a value may be the number of the layers."""
        return type(value) is int and value == self.length

    def listed_by(self, key: str, value: Any) -> bool:
        """Whether an entry is a list with an item for each layer: by its name, or by the layers."""
        if type(value) not in (list, tuple) or len(value) != self.length or key.startswith("_"):
            return False
        if not all(item is None or isinstance(item, (str, int, float)) for item in value):
            return False
        return bool(_TELLING.search(key)) or _reflected(value, self.container)

    def later(self, value: Any, item: int | None = None) -> Any:
        """A number, that number of a list, or a list without what speaks of the layers that go."""
        if item is not None:
            less = (v - len(self.gone) if i == item else v for i, v in enumerate(value))
            return type(value)(less)
        if type(value) is int:
            return value - len(self.gone)
        return type(value)(one for place, one in enumerate(value) if place not in self.gone)


def find_counts(model: nn.Module, path: str, gone: Sequence[int]) -> Iterator[Change]:
    """What has to change around the container at ``path`` when the children ``gone`` go.

    Looked at are the modules that the container is a part of, and their configs.  Where it is
    itself a part of a layer, names say nothing: a number of layers may be that of the outer list.
    """
    container = model.get_submodule(path)
    keys = tuple(list(container._modules)[place] for place in gone)
    parts = path.split(".") if path else []
    seen: set[int] = set()
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        rest = ".".join(parts[depth:])
        inner = _is_inner(model, parts, depth)
        stack = _Stack(rest, container, tuple(gone), keys)
        if not inner:
            yield from _by_name(vars(owner), stack)
        for config in list(filter(is_config, vars(owner).values())):
            if id(vars(config)) not in seen:
                holders = dict(_holders(config, ()))
                seen.update(map(id, holders.values()))
                yield from _in_config(owner, config, stack, holders, by_name=not inner)


def _is_inner(model: nn.Module, parts: Sequence[str], depth: int) -> bool:
    """Whether a list is between a module of the path and its end: a part of a layer."""
    between = (model.get_submodule(".".join(parts[:end])) for end in range(depth, len(parts)))
    return any(isinstance(module, _LISTS) for module in between)


def _in_config(
    owner: nn.Module,
    config: Any,
    stack: _Stack,
    holders: Mapping[Keys, dict[str, Any]],
    *,
    by_name: bool,
) -> Iterator[Change]:
    """What has to change in a config: as building from it shows, or by names."""
    choice = _proven(owner, config, stack, holders)
    for entry in choice or ():
        holder = holders[entry.at]
        yield Change(holder, entry.key, stack.later(holder[entry.key], entry.item))
    if choice is None and by_name:
        for holder in holders.values():
            yield from _by_name(holder, stack)


def _holders(config: Any, at: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """The attribute dicts of a config and of those in it."""
    yield at, vars(config)
    for key, value in list(vars(config).items()):
        if is_config(value) and not key.startswith("_") and len(at) < 4:
            yield from _holders(value, (*at, key))


def _by_name(holder: dict[str, Any], stack: _Stack) -> Iterator[Change]:
    """Entries that are called like numbers or lists of layers, and are one by their value.

    Where several are (layers of an encoder and of a decoder), those that are called after a part
    of the container's path.
    """
    counts = [key for key in filter(_TELLING.search, holder) if stack.counted_by(holder[key])]
    words = tuple(re.findall(r"(?<![^._])[^._]{3}", stack.path))
    close = [key for key in counts if key.startswith(words)]
    lists = [key for key in holder if stack.listed_by(key, holder[key])]
    for key in (*(close or counts), *lists):
        yield Change(holder, key, stack.later(holder[key]))


def _reflected(values: Sequence[Any], container: nn.Module) -> bool:
    """Whether every child has an attribute, of one name, with the item that has its place."""
    if len(set(map(repr, values))) < 2:
        return False
    common: set[str] | None = None
    for value, child in zip(values, container._modules.values(), strict=True):
        own = {
            name
            for module in (child.modules() if child is not None else ())
            for name, held in vars(module).items()
            if type(held) is type(value) and held == value
        }
        common = own if common is None else common & own
    return bool(common)


def _proven(
    owner: nn.Module, config: Any, stack: _Stack, holders: Mapping[Keys, dict[str, Any]]
) -> Sequence[_Entry] | None:
    """Entries with whose changes the owner would be built as it is once the layers are gone.

    If no choice of entries does that, those with which it would at least have as many layers;
    none if there are none.  None where the owner can't be built from its config.
    """
    dense = build_from(owner, config)
    if dense is None or _length(dense, stack) != stack.length:
        return None
    wanted = stack.shapes_after(_shapes_of(dense))
    second: Sequence[_Entry] = ()
    for choice in islice(_choices(holders, stack), _MOST_BUILDS):
        built = build_from(owner, _changed(config, choice, stack))
        if built is not None and _shapes_of(built) == wanted:
            return choice
        if built is not None and _length(built, stack) == stack.length - len(stack.gone):
            second = second or choice
    return second


def _changed(config: Any, choice: Sequence[_Entry], stack: _Stack) -> Any:
    later = copy.deepcopy(config)
    for entry in choice:
        holder = vars(later)
        for key in entry.at:
            holder = vars(holder[key])
        holder[entry.key] = stack.later(holder[entry.key], entry.item)
    return later


def _choices(holders: Mapping[Keys, dict[str, Any]], stack: _Stack) -> Iterator[list[_Entry]]:
    """One or two integers that may count the layers, likely ones first; with the lists, without."""
    counts: list[_Entry] = []
    lists: list[_Entry] = []
    for at, holder in holders.items():
        for key, value in holder.items():
            if stack.counted_by(value):
                counts.append(_Entry(at, key))
            elif stack.listed_by(key, value):
                lists.append(_Entry(at, key))
            counts += (_Entry(at, key, item) for item in _places(stack, key, value))
    counts.sort(key=lambda entry: not _TELLING.search(entry.key))
    for size in (1, 2):
        for some in combinations(counts, size):
            yield from ([*some, *more] for more in ([lists, []] if lists else [[]]))


def _places(stack: _Stack, key: str, value: Any) -> list[int]:
    """The items of a list that may count the layers."""
    if type(value) not in (list, tuple) or key.startswith("_"):
        return []
    return [place for place, item in enumerate(value) if stack.counted_by(item)]


def build_from(owner: nn.Module, config: Any) -> nn.Module | None:
    """A module of the owner's class, made from a config alone, without values."""
    kind = type(owner)
    try:
        required = [
            parameter
            for parameter in list(inspect.signature(kind).parameters.values())
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if len(required) != 1:
            return None
        with same_draws(), torch.device("meta"), silence():
            return kind(copy.deepcopy(config))
    except Exception:  # a constructor may raise anything: then nothing is known of it
        return None


@contextmanager
def silence() -> Iterator[None]:
    """Without warnings of what a constructor thinks of a config that is only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _length(module: nn.Module, stack: _Stack) -> int:
    """How many children the stack has in a module that was built anew; -1 without the stack."""
    try:
        return len(module.get_submodule(stack.path)._modules)
    except AttributeError:
        return -1


def _shapes_of(module: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
