"""Integers of modules that equal a removed width, and that the traced forward did not read.

Nobody can tell from the number alone what such an integer counts.  What a cut would make of it is
listed here; :mod:`prunus.verifier.other_ways` tries it where another method of the class reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.expressions import attributes_in
from prunus.graph.plan_records import Edit
from prunus.surgeon.attributes import find_rewrite

_STANDARD = frozenset(
    {
        *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features"),
        *("num_channels", "num_groups", "num_embeddings", "embedding_dim", "num_parameters"),
        *("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "padding_idx"),
        *("input_size", "hidden_size", "proj_size", "num_layers", "training"),
    }
)
"""What PyTorch's layers say of themselves: a table edits it."""


@dataclass(frozen=True)
class Unread:
    """An integer that may be stale after a cut.

    Attributes
    ----------
    module, attribute
        The module's path; ``"name"`` or ``"name[1]"``.
    before
        Its value.
    after
        What the widths of that value, of the module and the modules in it, become; ascending.
    heads
        What a count of heads of that value, or the width of them all, becomes; empty where
        the module has none.
    is_width
        Whether a cut axis of the module was that long.
    """

    module: str
    attribute: str
    before: int
    after: tuple[int, ...]
    heads: tuple[int, ...]
    is_width: bool

    def __str__(self) -> str:
        place = f"{self.module}.{self.attribute}" if self.module else self.attribute
        became = " and ".join(str(size) for size in self.after)
        return f"{place} is {self.before}; widths of {self.before} in that module became {became}"


def find_unread(
    model: nn.Module, graph: CouplingGraph, kept: Mask, edits: Iterable[Edit]
) -> list[Unread]:
    """Every integer that equals an old width of its module and that no equation speaks of.

    Parameters
    ----------
    model, graph, kept
        The model before the cut, its graph, and the units that it keeps.
    edits
        The attributes that follow already.
    """
    edits = tuple(edits)
    known = {(e.module, e.attribute.partition("[")[0].partition(".")[0]) for e in edits}
    for equation in graph.equations:
        known |= {(a.module, a.name) for a in attributes_in(equation.expression)}
    widths, heads = _widths(graph, kept, edits), _heads(graph, kept)
    found = []
    for path, module in model.named_modules():
        own, counts = widths.get(path, {}), heads.get(path, {})
        for name, attribute, value in _integers(module):
            several = counts.get(value, set())
            after = tuple(sorted(own.get(value, set()) | several))
            if after and (path, name) not in known:
                made = (path, attribute, value, after, tuple(sorted(several)), value in own)
                found.append(Unread(*made))
    return found


def head_counts(found: Iterable[Unread]) -> Iterator[Edit]:
    """Of those that are called so: the counts of heads that exactly one cut axis explains."""
    for one in found:
        if "head" in one.attribute.lower() and one.heads == one.after and len(one.heads) == 1:
            yield Edit(one.module, one.attribute, one.before, one.heads[0])


def _integers(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Name, place and value of the integers above 1 that a module itself keeps.

    Those that PyTorch's layers keep are its own affair.
    """
    if type(module).__module__.startswith("torch.nn."):
        return
    standard = _STANDARD if find_rewrite(module) is not None else frozenset(("training",))
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in standard:
            for place, item in _items(name, value):
                if type(item) is int and item > 1:
                    yield name, place, item


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    if type(value) in (tuple, list):
        return [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return [(name, value)]


_Sizes = dict[str, dict[int, set[int]]]
"""Module path → size before → sizes after."""


def _widths(graph: CouplingGraph, kept: Mask, edits: Iterable[Edit]) -> _Sizes:
    """Of every module that holds a cut axis: what its widths, and those inside it, become."""
    found: _Sizes = {}
    for axis, stay in graph.positions(kept):
        _note(found, axis.tensor.rpartition(".")[0], len(graph.labels[axis]), len(stay))
    for edit in edits:
        if type(edit.before) is int and type(edit.after) is int:
            _note(found, edit.module, edit.before, edit.after)
    return found


def _heads(graph: CouplingGraph, kept: Mask) -> _Sizes:
    """Of every module: what counts of units of several positions, and their widths, become."""
    found: _Sizes = {}
    stay = {axis: len(positions) for axis, positions in graph.positions(kept)}
    for group in graph.groups:
        left = int(kept[group.units].sum())
        if left == group.size:
            continue
        for axis, _ in group.axes:
            if axis in stay and len(graph.labels[axis]) > group.size:
                path = axis.tensor.rpartition(".")[0]
                _note(found, path, group.size, left)
                _note(found, path, len(graph.labels[axis]), stay[axis])
    return found


def _note(found: _Sizes, path: str, before: int, after: int) -> None:
    """Of a module and of all that it is in."""
    while True:
        found.setdefault(path, {}).setdefault(before, set()).add(after)
        if not path:
            return
        path = path.rpartition(".")[0]


def unexplained(found: Iterable[Unread], edits: Mapping[tuple[str, str], Edit]) -> tuple[str, ...]:
    """Those that exactly one width explains and that no edit follows, in words."""
    return tuple(
        str(one)
        for one in found
        if one.is_width and len(one.after) == 1 and (one.module, one.attribute) not in edits
    )
