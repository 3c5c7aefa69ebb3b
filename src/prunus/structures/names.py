"""The parts of a model by the names that people use, found in what ran and not in class names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunus.errors import PlanError, checks_options
from prunus.graph.amounts import Kind
from prunus.graph.axis import Role
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.structures.stream import find_stream
from prunus.tracer.attention import Core, Units, find_cores


@dataclass(frozen=True)
class Structure:
    """One group, by what it is.

    Attributes
    ----------
    layer
        Path of the layer that it belongs to, ``"encoder.layer.3"``; empty outside of layers.
    group, size
        Name of the group and the number of its units.
    heads
        How many query heads of an attention one unit is; 0 where units are no heads.
    experts
        How many experts one unit is: one of every routing group; 0 where units are no experts.
    """

    kind: Kind
    layer: str
    group: str
    size: int
    heads: int = 0
    experts: int = 0

    @property
    def each(self) -> int:
        """What one unit counts for where somebody says how many are removed."""
        return {"query heads": self.heads, "experts": self.experts}.get(self.kind, 1)


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention module of a layer.

    Attributes
    ----------
    module
        Path of the module that computes it.
    layer
        Path of its layer.
    heads
        For each query head the units that have to stay for it to stay, shape ``(heads, columns)``;
        0 stands for what always stays.
    kv_heads
        How many heads keys and values have.
    """

    module: str
    layer: str
    heads: NDArray[np.int64]
    kv_heads: int


@dataclass(frozen=True)
class Layer:
    """One layer of a stack, and what can be pruned in it."""

    path: str
    structures: tuple[Structure, ...]

    def sizes(self, kind: Kind) -> tuple[int, ...]:
        """Numbers of units of that kind."""
        return tuple(s.size for s in self.structures if s.kind == kind)


@dataclass(frozen=True)
class Anatomy:
    """A model as a person thinks of it.

    Attributes
    ----------
    structures
        One for every group of the graph, in its order.
    attentions
        In the order in which they run.
    """

    structures: tuple[Structure, ...]
    attentions: tuple[Attention, ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layers in their order."""
        paths = dict.fromkeys(a.layer for a in self.attentions)
        paths |= dict.fromkeys(s.layer for s in self.structures)
        return tuple(
            Layer(path, tuple(s for s in self.structures if s.layer == path))
            for path in sorted(filter(None, paths), key=_natural)
        )

    @cached_property
    def stacks(self) -> Mapping[str, tuple[Layer, ...]]:
        """Layers by the path of the list that holds them."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.path.rpartition(".")[0], []).append(layer)
        return {path: tuple(layers) for path, layers in found.items()}

    def of(self, *kinds: Kind) -> tuple[Structure, ...]:
        """The structures of these kinds."""
        return tuple(s for s in self.structures if s.kind in kinds)

    def attention(self, where: int | str) -> Attention:
        """The attention of a layer, by the layer's number, its path, or the attention's own.

        Raises
        ------
        PlanError
            If there is none, or more than one; the message lists the paths.
        """
        found = [a for a in self.attentions if self._is_at(a, where)]
        distinct = {a.module: a for a in found}
        if len(distinct) == 1:
            return found[0]
        known = list(dict.fromkeys(a.module for a in self.attentions))
        raise PlanError(
            f"{len(distinct) or 'no'} attentions are found at layer {where!r}",
            why="the attentions are " + (", ".join(known) or "none: no softmax(q kᵀ) v ran"),
            fix="name one of them" if known else "",
        )

    def _is_at(self, attention: Attention, where: int | str) -> bool:
        if isinstance(where, str):
            return where in (attention.module, attention.layer)
        stack, _, index = attention.layer.rpartition(".")
        return index == str(where) and stack in self.stacks


@checks_options
def find_structures(graph: CouplingGraph) -> Anatomy:
    """Heads, KV groups, head dims, FFN widths, experts and hidden widths of a traced model.

    They are recognised by what ran: an attention is a softmax between two products of activations
    (or the fused operator), a residual stream is added to what was computed from it.

    Examples
    --------
    >>> import prunus, torch
    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> graph = prunus.trace(nn.Sequential(layer), torch.ones(1, 3, 8))
    >>> [(s.kind, s.size) for s in prunus.structures.find_structures(graph).structures]
    [('heads', 2), ('head dims', 8), ('ffn', 16)]
    """
    cores = [] if graph.program is None else list(find_cores(graph.program))
    kinds = _Kinds(graph, cores)
    homes = [core.module or kinds.home_of(core) for core in cores]
    paths = _Paths(graph, homes, kinds)
    found = tuple(
        Structure(
            paths.narrow(kind, group),
            paths.layer_of_group(group, kind),
            group.name,
            group.size,
            _heads_of(group, cores) if "heads" in kind or kind == "kv groups" else 0,
            _experts_of(group, graph) if kind == "experts" else 0,
        )
        for group, kind in kinds.of_groups()
    )
    attentions = tuple(
        Attention(core.module or home, paths.layer_of(home), core.queries, _distinct(core.keys))
        for core, home in zip(cores, homes, strict=True)
    )
    return Anatomy(found, attentions)


def _heads_of(group: Group, cores: Iterable[Core]) -> int:
    """How many query heads of the first attention that has it a unit is."""
    counts = (int((core.queries == group.units[0]).any(axis=1).sum()) for core in cores)
    return next(filter(None, counts), 0)


def _experts_of(group: Group, graph: CouplingGraph) -> int:
    """How many rows of the router, or parts of stacked weights, the first unit is."""
    return int((graph.labels[group.axes[0][0]] == group.units[0]).any(axis=1).sum())


def _distinct(label: NDArray[np.int64]) -> int:
    return len(np.unique(label, axis=0))


class _Kinds:
    """What the units of every group are."""

    def __init__(self, graph: CouplingGraph, cores: Sequence[Core]) -> None:
        self._graph = graph
        size = graph.unit_count + 1
        self._heads, self._shared = _flags(size), _flags(size)
        self._rep = _flags(size)
        for core in cores:
            keys = np.setdiff1d(core.keys, [0])
            shares = len(keys) < len(core.queries) and _distinct(core.keys) < len(core.queries)
            (self._shared if shares else self._heads)[keys] = True
            self._rep[np.setdiff1d(core.queries, [0, *keys])] = True
        self._scores = _flags(size, *(core.scores for core in cores))
        self._values = _flags(size, *(core.values for core in cores))
        self._stream = _flags(size, *find_stream(graph))

    def of_groups(self) -> Iterator[tuple[Group, Kind]]:
        for group in self._graph.groups:
            yield group, self._of(group)

    def home_of(self, core: Core) -> str:
        """Where the weights are that make an attention which no module computes by itself."""
        for own in (core.values, core.scores, core.queries):  # heads may be shared by layers
            for group in self._graph.groups:
                made = [axis.tensor for axis, role in group.axes if role is Role.PRODUCER]
                if made and np.isin(group.units, own).any():
                    return made[0].rpartition(".")[0].rpartition(".")[0]
        return ""

    def _of(self, group: Group) -> Kind:
        units = group.units
        if self._shared[units].any():
            return "kv groups"
        if self._heads[units].any():
            return "heads"
        if self._stream[units].any():
            return "hidden"
        if self._rep[units].any():
            return "query heads"
        scores, values = self._scores[units].any(), self._values[units].any()
        if scores or values:
            return "head dims" if scores and values else "qk dims" if scores else "vo dims"
        kind = _by_weights(group, self._graph)
        return "other" if kind == "ffn" and self._makes_heads(group) else kind

    def _makes_heads(self, group: Group) -> bool:
        """Whether weights read it to make queries, keys or values, as those of a latent width."""
        inside = self._shared | self._heads | self._rep | self._scores | self._values
        read = {axis.tensor for axis, role in group.axes if role is Role.CONSUMER}
        return any(
            inside[label[label > 0]].any()
            for axis, label in self._graph.labels.items()
            if axis.tensor in read and self._graph.roles[axis] is Role.PRODUCER
        )


def _by_weights(group: Group, graph: CouplingGraph) -> Kind:
    """A width between two products of weights: of linear layers, experts or convolutions."""
    places = set(_contracted(group, graph))
    dims = {count for count, _, _ in places}
    if dims == {2} and len({role for _, _, role in places}) == 2:
        return "ffn"
    if dims in ({3}, {2, 3}):
        if any(count == 3 and dim for count, dim, _ in places):
            return "ffn"
        return "routing groups" if _are_blocks(group, graph) else "experts"
    return "channels" if max(dims, default=0) > 2 else "other"


def _are_blocks(group: Group, graph: CouplingGraph) -> bool:
    """Whether every unit is a run of positions of the axes that it is on, beside other groups'."""
    label = graph.labels[group.axes[0][0]]
    own = np.where(np.isin(label, group.units), label, 0).max(axis=1)
    changes = int(np.count_nonzero(np.diff(own)))
    return label.shape[1] > 1 and len(label) > group.size == changes + 1


def _contracted(group: Group, graph: CouplingGraph) -> Iterator[tuple[int, int, Role]]:
    """Of each weight that makes or reads a group: its number of dims, which dim, and the role."""
    for axis, role in group.axes:
        if role in (Role.PRODUCER, Role.CONSUMER):
            yield len(graph.shapes[axis.tensor]), axis.dim, role


def _flags(size: int, *units: Units) -> NDArray[np.bool_]:
    flags = np.zeros(size, dtype=np.bool_)
    for some in units:
        flags[some] = True
    return flags


class _Paths:
    """Which layer a module belongs to: the innermost numbered one with attention and more.

    ``decoder.block.3.layer.1.attention`` belongs to ``decoder.block.3`` when the feed-forward
    width is in ``decoder.block.3.layer.2``.
    """

    def __init__(self, graph: CouplingGraph, attentions: Iterable[str], kinds: _Kinds) -> None:
        self._graph = graph
        attending = {p for module in attentions for p in numbered(module)}
        feeding = {
            prefix
            for group, kind in kinds.of_groups()
            if kind == "ffn"
            for axis, _ in group.axes
            for prefix in numbered(axis.tensor)
        }
        self._layers = (attending & feeding) or attending

    def layer_of(self, path: str) -> str:
        """The layer of a module or tensor; empty outside of any."""
        return next((p for p in reversed(numbered(path)) if p in self._layers), "")

    def narrow(self, kind: Kind, group: Group) -> Kind:
        """Outside of all layers, a width between two products is a classifier's, say."""
        inside = any(self.layer_of(axis.tensor) for axis, _ in group.axes)
        return "other" if kind == "ffn" and not inside else kind

    def layer_of_group(self, group: Group, kind: Kind) -> str:
        """The layer that all producing axes are in."""
        if kind == "hidden":
            return ""
        axes = [a for a, role in group.axes if role is Role.PRODUCER] or [a for a, _ in group.axes]
        found = {self.layer_of(axis.tensor) for axis in axes}
        return found.pop() if len(found) == 1 else ""


def numbered(path: str) -> list[str]:
    """Prefixes of a path that end in a number, shortest first.

    >>> numbered("decoder.block.3.layer.1.attention")
    ['decoder.block.3', 'decoder.block.3.layer.1']
    """
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n, part in enumerate(parts) if part.isdigit()]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", path)]
