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
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
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
    if wanted is None and found.closed:
        name, why = next(iter(found.closed.items()))
        raise TraceError(
            f"output {name!r} can't be searched for tensors",
            why=f"it is {why}",
            fix="return the tensors themselves, or name the outputs whose shape matters: outputs=",
        )
    if not found.tensors:
        raise TraceError(
            "the forward returned no tensor",
            why="tensors are looked for in containers and in the attributes of objects",
            fix="wrap the model so that its forward returns the tensors",
        )
    if wanted is None:
        main = [(name, tensor) for name, tensor in found.tensors if name not in found.side]
        chosen = main or found.tensors
    else:
        globs = [wanted] if isinstance(wanted, str) else list(wanted)
        for glob in globs:
            if not any(_fits(name, glob) for name, _ in found.tensors):
                names = ", ".join(name for name, _ in found.tensors)
                raise TraceError(f"no output is called {glob!r}", why=f"the outputs are: {names}")
        chosen = [(n, t) for n, t in found.tensors if any(_fits(n, glob) for glob in globs)]
    kept = {name for name, _ in chosen}
    others = [found.side.get(name, name) for name, _ in found.tensors if name not in kept]
    arrays = [f"{name} (an array that was computed outside PyTorch)" for name, _ in found.arrays]
    return chosen, list(dict.fromkeys([*others, *found.caches, *found.closed, *arrays]))


def _fits(name: str, glob: str) -> bool:
    return name == glob or fnmatch(name, glob)


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
        elif not self._consume and isinstance(value, Iterator):
            return
        elif not isinstance(value, _ATOMS) and id(value) not in self._inside:
            why = self._closed(value)
            if why:
                self.found.closed[name] = why
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
        compiled = any(
            type(one).__name__.startswith(("pybind11", "nb_")) or one.__module__ == "torch._C"
            for one in kind.__mro__
        )
        named = f"a {kind.__module__}.{kind.__qualname__}"
        return named if compiled or isinstance(value, types.CoroutineType) else ""


_PLAIN = (list, tuple, dict)


def _items(value: Any) -> list[tuple[str, Any]]:
    """What a container or an object holds, by name."""
    found: dict[str, Any] | None = None
    if isinstance(value, Mapping):
        found = {}
        for index, (key, item) in enumerate(list(value.items())):
            searched = isinstance(key, Tensor)
            found[f"value{index}" if searched else str(key)] = item
            if searched:
                found[f"key{index}"] = key
    elif isinstance(value, tuple):
        names = getattr(type(value), "_fields", range(len(value)))
        found = {str(name): item for name, item in zip(names, value, strict=True)}
    elif isinstance(value, (list, deque, AbstractSet, ValuesView)):
        found = {str(index): item for index, item in enumerate(value)}
    elif isinstance(value, Iterator):
        found = {str(index): item for index, item in enumerate(_taken(value))}
    elif isinstance(value, np.ndarray):
        found = {str(index): item for index, item in enumerate(value.flat)}
    if found is None:
        return list(_attributes(value, whole=True))
    if type(value).__module__ not in ("builtins", "collections", "types"):
        for name, item in _attributes(value, whole=False):
            found.setdefault(name, item)
    return list(found.items())


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
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        for name, cell in cells.items():
            for item in gc.get_referents(cell):
                yield name, item
        yield "defaults", (value.__defaults__, value.__kwdefaults__)
        return
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        yield "self", value.__self__
        return
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = None
    if isinstance(own, dict):
        yield from ((str(name), item) for name, item in list(own.items()))
    slotted = False
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__"):
                slotted = True
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # the slot was never filled
                    continue
    if whole and own is None and not slotted and type(value).__flags__ & _HAVE_GC:
        inside = [item for item in gc.get_referents(value) if not isinstance(item, _ATOMS)]
        yield from ((str(index), item) for index, item in enumerate(inside))


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
