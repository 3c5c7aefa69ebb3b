"""Which Python attribute of a module speaks of which axis, and which integers may be stale.

Standard modules are looked up along their MRO, so that subclasses work.  Of an integer that equals
a removed width and that the traced forward did not read, nobody can tell from the number alone
what it counts: what a cut would make of it is listed here, and :mod:`prunus.verifier.other_ways`
tries it where another method of the class reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import PlanError
from prunus.graph.axis import Axis, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.expressions import Attribute, attributes_in, solve
from prunus.graph.plan_records import CLASS, Edit
from prunus.surgeon.reach import value_of
from prunus.tracer.adapters import slim_kind

Kept = Mapping[tuple[str, int], NDArray[np.int64]]
"""(tensor's own name, dim) → positions that stay, for the axes of one module that lose some."""

Rewrite = Callable[[Any, Kept], dict[str, Any]]

_TABLE: dict[type[nn.Module], Rewrite] = {}


def _for(*types: type[nn.Module]) -> Callable[[Rewrite], Rewrite]:
    def register(function: Rewrite) -> Rewrite:
        _TABLE.update(dict.fromkeys(types, function))
        return function

    return register


_Counted = Mapping[str, tuple[str, int]]
"""Attribute → the axis of which it is the number of positions."""

_COUNTED: dict[type[nn.Module], _Counted] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
}


def _counts(kept: Kept, counted: _Counted) -> dict[str, int]:
    """The number of positions that stay, for the axes that lose some."""
    return {name: len(kept[axis]) for name, axis in counted.items() if axis in kept}


def _blocks(kept: NDArray[np.int64], size: int, groups: int) -> int:
    """How many of ``groups`` equal blocks of an axis of ``size`` still hold a position."""
    return len(np.unique(kept // (size // groups)))


def _counting(counted: _Counted) -> Rewrite:
    return lambda module, kept: _counts(kept, counted)


_TABLE.update({kind: _counting(counted) for kind, counted in _COUNTED.items()})


@_for(nn.modules.conv._ConvNd)
def _convolution(module: nn.Conv2d, kept: Kept) -> dict[str, Any]:
    """Rows of the weight are outputs, of a transposed one inputs; only they lie in groups."""
    rows, columns = "out_channels", "in_channels"
    if module.transposed:
        rows, columns = columns, rows
    first, second = kept.get(("weight", 0)), kept.get(("weight", 1))
    size, groups = getattr(module, rows), module.groups
    if first is not None and groups > 1:
        groups = _blocks(first, size, groups)
    each = getattr(module, columns) // module.groups if second is None else len(second)
    size = size if first is None else len(first)
    return {rows: size, columns: each * groups, "groups": groups}


@_for(nn.modules.batchnorm._NormBase)
def _batch_norm(module: nn.BatchNorm2d, kept: Kept) -> dict[str, Any]:
    axis = ("weight", 0) if ("weight", 0) in kept else ("running_mean", 0)
    return _counts(kept, {"num_features": axis})


@_for(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, kept: Kept) -> dict[str, Any]:
    stay = kept.get(("weight", 0))
    if stay is None:
        return {}
    blocks = _blocks(stay, module.num_channels, module.num_groups)
    return {"num_channels": len(stay), "num_groups": blocks}


@_for(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(module: nn.LayerNorm, kept: Kept) -> dict[str, Any]:
    shape = [
        len(kept[("weight", dim)]) if ("weight", dim) in kept else size
        for dim, size in enumerate(module.normalized_shape)
    ]
    return {"normalized_shape": shape}


@_for(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention, kept: Kept) -> dict[str, Any]:
    """Heads and head dims are what the forward itself states."""
    packed = ("in_proj_weight", 1)
    query, key, value = (
        packed if packed in kept else (f"{name}_proj_weight", 1) for name in ("q", "k", "v")
    )
    named = {"embed_dim": query, "kdim": key, "vdim": value}
    return {CLASS: slim_kind(module)} | _counts(kept, named)


@_for(nn.RNNBase)
def _recurrent(module: nn.RNNBase, kept: Kept) -> dict[str, Any]:
    hidden = ("weight_hr_l0", 1) if module.proj_size else ("weight_hh_l0", 1)
    own = {
        "input_size": ("weight_ih_l0", 1),
        "hidden_size": hidden,
        "proj_size": ("weight_hr_l0", 0),
    }
    return _counts(kept, own)


def find_rewrite(module: nn.Module) -> Rewrite | None:
    """The table's entry for a module's type or its nearest ancestor."""
    return next((_TABLE[kind] for kind in type(module).__mro__ if kind in _TABLE), None)


def find_edits(model: nn.Module, graph: CouplingGraph, kept: Mask) -> tuple[Edit, ...]:
    """The attributes that have to change with the axes, in the model's order.

    Raises
    ------
    PlanError
        If the forward's code computes a size that no attribute can make right.
    """
    keep = dict(graph.positions(kept))
    edits = {(e.module, e.attribute): e for e in _edits(model, keep, graph.aliases)}
    standard = {(e.module, e.attribute.partition("[")[0]) for e in edits.values()}
    solution = solve(graph.equations, graph.attributes, kept)
    if solution.broken:
        raise PlanError(
            f"{len(solution.broken)} sizes that the forward computes can't follow this selection",
            where=", ".join(sorted({e.source for e in solution.broken})),
            why="the widths on that line depend on one another",
            fix="leave one of the groups out with exclude=",
        )
    for attribute, value in solution.values.items():
        before = graph.attributes[attribute]
        path = str(Attribute("", attribute.name, attribute.keys))
        if value != before and (attribute.module, attribute.name) not in standard:
            edits[attribute.module, path] = Edit(attribute.module, path, before, value)
    return (*edits.values(), *_of_transformers(model, edits))


def _of_transformers(model: nn.Module, edits: Mapping[tuple[str, str], Edit]) -> Iterator[Edit]:
    """What PyTorch's transformers keep beside their layers.

    An encoder may hand nested tensors to its layers, which only PyTorch's own attention takes.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Transformer):
            width = edits.get((f"{prefix}encoder.layers.0.self_attn", "embed_dim"))
            if width is not None and (name, "d_model") not in edits:
                yield Edit(name, "d_model", module.d_model, width.after)
        elif _nests(module, prefix, edits):
            yield Edit(name, "use_nested_tensor", True, False)


def _nests(module: nn.Module, prefix: str, edits: Collection[tuple[str, str]]) -> bool:
    """Whether an encoder may make nested tensors for an attention in it that changes its class."""
    slim = (path for path, attribute in edits if attribute == CLASS)
    inside = any(path.startswith(prefix) for path in slim)
    return inside and isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor


def _edits(
    model: nn.Module, keep: Mapping[Axis, NDArray[np.int64]], aliases: Mapping[str, str]
) -> Iterator[Edit]:
    touched: dict[str, dict[int, NDArray[np.int64]]] = {}
    for axis, stay in keep.items():
        touched.setdefault(axis.tensor, {})[axis.dim] = stay
    for prefix, module in model.named_modules():
        rewrite = find_rewrite(module)
        if rewrite is None:  # a ScriptModule's tensors can't even be listed
            continue
        kept = {
            (name, dim): stay
            for name, own in _own_tensors(module)
            for dim, stay in touched.get(_first(prefix, own, aliases), {}).items()
        }
        for attribute, after in rewrite(module, kept).items() if kept else ():
            before = value_of(module, attribute)
            edit = Edit(prefix, attribute, before, after)
            if before is not None and edit.before != edit.after:
                yield edit


def _first(prefix: str, own: str, aliases: Mapping[str, str]) -> str:
    full = f"{prefix}.{own}" if prefix else own
    return aliases.get(full, full)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names that the table knows, with the tensors that have their shape.

    A parametrization, or the older ``weight_norm`` and ``spectral_norm``, computes the weight
    from another tensor.
    """
    for name in (*module._parameters, *module._buffers):
        plain = name.removesuffix("_orig")
        if f"{name.removesuffix('_v')}_g" in module._parameters:
            plain = name.removesuffix("_v")
        yield plain, name
    chains = module._modules.get("parametrizations")
    for name, chain in ({} if chains is None else chains._modules).items():
        originals = () if chain is None else tuple(chain._parameters)
        if originals:  # one of them, or the magnitude and, last, the direction
            yield name, f"parametrizations.{name}.{originals[-1]}"


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
