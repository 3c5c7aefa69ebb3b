"""What a forward returns: every tensor in it by name, and what may shrink or can't be searched.

Containers are searched, and so are objects: their attributes and slots, the variables that a
returned function closes over, what an iterator yields.  Modules are not, nor caches of
transformers, which shrink with the layers that fill them.
"""

from __future__ import annotations

import gc
import io
import types
import weakref
from collections import deque
from collections.abc import (
    Callable,
    Container,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatch
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import TraceError

SIDE_OUTPUTS = frozenset(
    prefix + name
    for name in ("hidden_states", "attentions", "past_key_values")
    for prefix in (
        *("", "encoder_", "decoder_", "cross_", "global_", "local_", "reshaped_", "intermediate_"),
        *("audio_", "image_", "text_", "video_", "vision_", "language_", "entity_", "depth_"),
        *("ngram_", "decoder_ngram_", "cross_encoder_", "encoder_global_", "depth_decoder_"),
        *("encoder_text_", "encoder_vision_", "text_encoder_", "speech_encoder_"),
        *("transformer_decoder_", "pixel_decoder_", "mask_decoder_", "projection_"),
        *("question_enc_", "generator_enc_", "generator_dec_", "generator_cross_"),
        *("detr_encoder_", "detr_decoder_", "high_res_vision_", "head_", "fpn_"),
    )
) | {"mems", "cache_params", "shared_kv_states", "past_buckets_states", "padding_cache"}
"""Fields of transformers' output classes that may shrink: internals that one may ask to see."""

MOST_OBJECTS = 20_000
"""A result of more containers and objects is not searched to its end."""

MOST_ITEMS = 1_000
"""Items that are taken of an iterator."""

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, Enum, type),
    *(np.generic, nn.Module, io.IOBase, types.ModuleType, weakref.ref, torch.Generator),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""What holds no tensor that leaves the forward."""

_HAVE_GC = 1 << 14
"""The flag of types whose references Python's collector knows."""


@dataclass
class Outputs:
    """What a result holds, each under a dotted name.

    Attributes
    ----------
    tensors
        Every tensor, in a stable order.
    arrays
        NumPy arrays of numbers.
    side
        Name of a tensor → the field of a transformers output class that it stands in.
    caches
        Cache objects of transformers; they are not searched.
    closed
        Name → the type of what can't be searched, or why not.
    """

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    arrays: list[tuple[str, Any]] = field(default_factory=list)
    side: dict[str, str] = field(default_factory=dict)
    caches: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)

    def with_arrays(self, made: Sequence[tuple[Any, Tensor]]) -> Outputs:
        """The same, where arrays that share the memory of tensors count as those tensors."""
        known = {_place(array): tensor for array, tensor in made}
        same = [(name, known[_place(a)]) for name, a in self.arrays if _place(a) in known]
        left = [(name, array) for name, array in self.arrays if _place(array) not in known]
        return replace(self, tensors=[*self.tensors, *same], arrays=left)


def find_outputs(result: Any) -> Outputs:
    """Search what a forward returned.

    Iterators are consumed, so it has to be called where the forward ran: under the same modes.

    >>> found = find_outputs(torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
    >>> [name for name, _ in found.tensors]
    ['loc', 'scale']
    """
    search = _Search()
    search.visit(result, "", "")
    return search.found


def find_left_in(inputs: Any) -> list[tuple[str, Tensor]]:
    """Tensors in the containers and objects that a forward was given; no iterator is consumed."""
    search = _Search(consume=False)
    search.visit(inputs, "", "")
    return search.found.tensors


def answer_of(result: Any) -> dict[str, Tensor]:
    """Every tensor and array of numbers that a forward returned, by name, as dense tensors."""
    found = find_outputs(result)
    tensors = {
        name: tensor if tensor.layout == torch.strided else tensor.to_dense()
        for name, tensor in found.tensors
    }
    return tensors | {name: _as_tensor(array) for name, array in found.arrays}


def select_outputs(
    found: Outputs, wanted: str | Sequence[str] | None
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """The outputs whose shape is kept, and the names of the others, which may shrink.

    Raises
    ------
    TraceError
        If there is no tensor, none of a name that is wanted, or, where none are named, something
        that can't be searched for tensors.
    """
    if wanted is None:
        _refuse_closed(found)
    if not found.tensors:
        raise TraceError(
            "the forward returned no tensor",
            why="tensors are looked for in containers and in the attributes of objects",
            fix="wrap the model so that its forward returns the tensors",
        )
    if wanted is None:
        chosen = [one for one in found.tensors if one[0] not in found.side] or found.tensors
    else:
        chosen = _named(found, [wanted] if isinstance(wanted, str) else wanted)
    kept = {name for name, _ in chosen}
    return chosen, _released(found, kept)


def _released(found: Outputs, kept: Container[str]) -> list[str]:
    others = [found.side.get(name, name) for name, _ in found.tensors if name not in kept]
    arrays = [f"{name} (an array that was computed outside PyTorch)" for name, _ in found.arrays]
    return list(dict.fromkeys([*others, *found.caches, *found.closed, *arrays]))


def _refuse_closed(found: Outputs) -> None:
    for name, why in found.closed.items():
        raise TraceError(
            f"output {name!r} can't be searched for tensors",
            why=f"it is {why}",
            fix="return the tensors themselves, or name the outputs whose shape matters: outputs=",
        )


def _named(found: Outputs, globs: Sequence[str]) -> list[tuple[str, Tensor]]:
    names = [name for name, _ in found.tensors]
    chosen: set[str] = set()
    for glob in globs:
        fitting = {name for name in names if name == glob or fnmatch(name, glob)}
        if not fitting:
            why = f"the outputs are: {', '.join(names)}"
            raise TraceError(f"no output is called {glob!r}", why=why)
        chosen |= fitting
    return [one for one in found.tensors if one[0] in chosen]


def _place(array: Any) -> tuple[Any, ...]:
    """Equal for arrays that are the same memory."""
    interface = array.__array_interface__
    return interface["data"][0], interface["typestr"], array.shape, array.strides


def _as_tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


class _Search:
    """Walks a result, and notes what it meets."""

    def __init__(self, *, consume: bool = True) -> None:
        self.found = Outputs()
        self._consume = consume
        self._inside: set[int] = set()  # containers on the way here, of which one may hold itself
        self._seen: dict[tuple[int, bool], Any] = {}  # objects, kept so that no id is used again

    def visit(self, value: Any, path: str, side: str) -> None:
        """Search a value that stands at a path, inside a field that may shrink or none."""
        name = path or "output"
        if isinstance(value, Tensor):
            self.found.tensors.append((name, value))
            if side:
                self.found.side[name] = side
        elif isinstance(value, np.ndarray) and value.dtype != object:
            if value.dtype.kind in "biufc":
                self.found.arrays.append((name, value))
        elif _is_cache(value):
            self.found.caches.append(side or name)
        else:
            self._enter(value, path, side)

    def _enter(self, value: Any, path: str, side: str) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._inside:
            return
        if not self._consume and isinstance(value, Iterator):
            return
        why = self._closed(value)
        if why:
            self.found.closed[path or "output"] = why
        elif self._is_new(value, side):
            self._open(value, path, side)

    def _is_new(self, value: Any, side: str) -> bool:
        if type(value) in _PLAIN:
            return True
        key = (id(value), bool(side))
        new = key not in self._seen
        self._seen[key] = value
        return new

    def _open(self, value: Any, path: str, side: str) -> None:
        self._inside.add(id(value))
        declared = _side_fields(type(value))
        for key, item in _items(value):
            name = f"{path}.{key}" if path else key
            self.visit(item, name, side or (name if key in declared else ""))
        self._inside.discard(id(value))

    def _closed(self, value: Any) -> str:
        """Why something can't be searched; empty where it can."""
        kind = type(value)
        if kind in _PLAIN:
            return ""
        if len(self._seen) >= MOST_OBJECTS:
            return f"part of more than {MOST_OBJECTS:,} objects"
        if isinstance(value, AbstractSet) and not isinstance(value, (KeysView, ItemsView)):
            several = len(value) > 1 and any(isinstance(item, Tensor) for item in value)
            return "a set of tensors, which has no order" if several else ""
        closed = isinstance(value, types.CoroutineType) or any(map(_is_compiled, kind.__mro__))
        return f"a {kind.__module__}.{kind.__qualname__}" if closed else ""


_PLAIN = (list, tuple, dict)


def _is_compiled(kind: type) -> bool:
    return type(kind).__name__.startswith(("pybind11", "nb_")) or kind.__module__ == "torch._C"


def _items(value: Any) -> list[tuple[str, Any]]:
    """What a container or an object holds, by name."""
    named = next((make for kinds, make in _NAMED if isinstance(value, kinds)), None)
    if named is None:
        return list(_attributes(value, whole=True))
    found = named(value)
    if type(value).__module__ not in ("builtins", "collections", "types"):
        for name, item in _attributes(value, whole=False):
            found.setdefault(name, item)
    return list(found.items())


def _entries(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    found = {}
    for index, (key, item) in enumerate(list(mapping.items())):
        searched = isinstance(key, Tensor)
        found[f"value{index}" if searched else str(key)] = item
        if searched:
            found[f"key{index}"] = key
    return found


def _fields(value: tuple[Any, ...]) -> dict[str, Any]:
    names = getattr(type(value), "_fields", range(len(value)))
    return {str(name): item for name, item in zip(names, value, strict=True)}


def _numbered(items: Iterable[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


_NAMED: tuple[tuple[Any, Callable[[Any], dict[str, Any]]], ...] = (
    (Mapping, _entries),
    (tuple, _fields),
    ((list, deque, AbstractSet, ValuesView), _numbered),
    (Iterator, lambda iterator: _numbered(_taken(iterator))),
    (np.ndarray, lambda array: _numbered(array.flat)),
)
"""Containers, and how the names of what they hold are made."""


def _taken(iterator: Iterator[Any]) -> list[Any]:
    items = list(islice(iterator, MOST_ITEMS + 1))
    if len(items) > MOST_ITEMS:
        raise TraceError(
            f"the forward returned an iterator of more than {MOST_ITEMS:,} items",
            fix="return a list, or wrap the model so that its forward returns the tensors",
        )
    return items


def _attributes(value: Any, *, whole: bool) -> Iterator[tuple[str, Any]]:
    """Attributes and slots of an object, without calling any code of its class.

    Of an object that has neither, ``whole`` asks for all that it refers to.
    """
    if isinstance(value, types.FunctionType):
        return _bound_to(value)
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        return iter((("self", value.__self__),))
    return _own_attributes(value, whole=whole)


def _bound_to(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from ((name, item) for item in gc.get_referents(cell))
    yield "defaults", (function.__defaults__, function.__kwdefaults__)


def _own_attributes(value: Any, *, whole: bool) -> Iterator[tuple[str, Any]]:
    own: Any = None
    with suppress(AttributeError):
        own = object.__getattribute__(value, "__dict__")
    if isinstance(own, dict):
        yield from [(str(name), item) for name, item in own.items()]
    slots = _slots(type(value))
    for name, member in slots:
        with suppress(AttributeError):  # the slot was never filled
            yield name, member.__get__(value)
    if whole and own is None and not slots and type(value).__flags__ & _HAVE_GC:
        inside = [item for item in gc.get_referents(value) if not isinstance(item, _ATOMS)]
        yield from _numbered(inside).items()


def _slots(kind: type) -> list[tuple[str, Any]]:
    return [
        (name, member)
        for one in kind.__mro__
        for name, member in vars(one).items()
        if isinstance(member, types.MemberDescriptorType) and not name.startswith("__")
    ]


def _is_cache(value: Any) -> bool:
    return any(
        kind.__module__.startswith("transformers.") and kind.__name__.endswith("Cache")
        for kind in type(value).__mro__
    )


def _side_fields(kind: type) -> frozenset[str]:
    """Fields that may shrink: those that transformers' own output classes declare."""
    if not any(_is_theirs(one) and one.__name__ == "ModelOutput" for one in kind.__mro__):
        return frozenset()
    declared: set[str] = set()
    for one in kind.__mro__:
        if _is_theirs(one):
            declared |= set(vars(one).get("__dataclass_fields__", ()))
    return SIDE_OUTPUTS & declared


def _is_theirs(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")
