"""Which Python attribute of a standard module speaks of which axis.

Modules are looked up along their MRO, so that subclasses work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prunus.errors import PlanError
from prunus.graph.axis import Axis, Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.expressions import Attribute, solve
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


def _counts(kept: Kept, **attributes: tuple[str, int]) -> dict[str, int]:
    """Attribute → number of positions that stay, for the axes that lose some."""
    return {name: len(kept[axis]) for name, axis in attributes.items() if axis in kept}


def _blocks(kept: NDArray[np.int64], size: int, groups: int) -> int:
    """How many of ``groups`` equal blocks of an axis of ``size`` still hold a position."""
    return len(np.unique(kept // (size // groups)))


@_for(nn.Linear)
def _linear(module: nn.Linear, kept: Kept) -> dict[str, Any]:
    return _counts(kept, out_features=("weight", 0), in_features=("weight", 1))


@_for(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d, kept: Kept) -> dict[str, Any]:
    out, ins = kept.get(("weight", 0)), kept.get(("weight", 1))
    groups = module.groups
    if out is not None and groups > 1:
        groups = _blocks(out, module.out_channels, module.groups)
    columns = module.in_channels // module.groups if ins is None else len(ins)
    return {
        "out_channels": module.out_channels if out is None else len(out),
        "in_channels": columns * groups,
        "groups": groups,
    }


@_for(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed(module: nn.ConvTranspose2d, kept: Kept) -> dict[str, Any]:
    ins, out = kept.get(("weight", 0)), kept.get(("weight", 1))
    groups = module.groups
    if ins is not None and groups > 1:
        groups = _blocks(ins, module.in_channels, module.groups)
    columns = module.out_channels // module.groups if out is None else len(out)
    return {
        "in_channels": module.in_channels if ins is None else len(ins),
        "out_channels": columns * groups,
        "groups": groups,
    }


@_for(nn.modules.batchnorm._NormBase)
def _batch_norm(module: nn.BatchNorm2d, kept: Kept) -> dict[str, Any]:
    axes = [axis for axis in (("weight", 0), ("running_mean", 0)) if axis in kept]
    return _counts(kept, num_features=axes[0]) if axes else {}


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


@_for(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: nn.Embedding, kept: Kept) -> dict[str, Any]:
    return _counts(kept, num_embeddings=("weight", 0), embedding_dim=("weight", 1))


@_for(nn.PReLU)
def _prelu(module: nn.PReLU, kept: Kept) -> dict[str, Any]:
    return _counts(kept, num_parameters=("weight", 0))


@_for(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention, kept: Kept) -> dict[str, Any]:
    """Heads and head dims are what the forward itself states."""
    packed = ("in_proj_weight", 1)
    query, key, value = (
        packed if packed in kept else (f"{name}_proj_weight", 1) for name in ("q", "k", "v")
    )
    return {CLASS: slim_kind(module)} | _counts(kept, embed_dim=query, kdim=key, vdim=value)


@_for(nn.RNNBase)
def _recurrent(module: nn.RNNBase, kept: Kept) -> dict[str, Any]:
    hidden = ("weight_hr_l0", 1) if module.proj_size else ("weight_hh_l0", 1)
    own = {
        "input_size": ("weight_ih_l0", 1),
        "hidden_size": hidden,
        "proj_size": ("weight_hr_l0", 0),
    }
    return _counts(kept, **own)


@_for(nn.RNNCellBase)
def _recurrent_cell(module: nn.RNNCellBase, kept: Kept) -> dict[str, Any]:
    return _counts(kept, input_size=("weight_ih", 1), hidden_size=("weight_hh", 1))


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
