"""Turn a freshly built model into one that was pruned: set attributes, put its tensors in place."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.errors import FormatError
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon.applied import Applied, copy_config, set_applied
from prunus.surgeon.apply import cut_own
from prunus.surgeon.biases import add_biases
from prunus.surgeon.depth import drop_blocks, is_continuous
from prunus.surgeon.reach import OF_EVERY_MODULE

Kind = Literal["parameter", "buffer", "hidden", "attribute"]
"""Where a module keeps a tensor; *hidden* buffers are no part of its ``state_dict``."""

_ANOTHER = "build= makes another model than the one that was saved"
_FIX = "give the function that made the model before it was pruned, with the same arguments"


@dataclass(frozen=True)
class Tensors:
    """All tensors of a model, each once.

    Attributes
    ----------
    values
        By their first names.
    aliases
        Other name → first name, of tied ones.
    kinds
        Of every name, other names as well, and those that are left out.
    frozen
        First names of parameters that don't require gradients.
    """

    values: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    kinds: Mapping[str, Kind]
    frozen: frozenset[str] = frozenset()

    def names(self) -> dict[str, list[str]]:
        """First name → all names of that tensor."""
        found = {name: [name] for name in self.values}
        for alias, first in self.aliases.items():
            found[first].append(alias)
        return found


def collect(model: nn.Module, written: Container[str] = ()) -> Tensors:
    """The tensors of a model, where they are.

    Those that are no part of its ``state_dict`` are left out where they are sparse or nested, or
    ``written`` by the forward: every model that is built has its own.
    """
    state, aliases = state_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {name: _kind(modules, name) for name in (*state, *aliases)}
    extra = {name for name in state if kinds[name] in ("attribute", "hidden")}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in extra or (_is_dense(tensor) and name not in written)
    }
    aliases = {name: first for name, first in aliases.items() if first in state}
    frozen = (n for n in state if kinds[n] == "parameter" and not state[n].requires_grad)
    return Tensors(state, aliases, kinds, frozenset(frozen))


def restore(model: nn.Module, tensors: Tensors, plan: Plan | None) -> None:
    """Make a fresh copy of the original the pruned model, in place.

    It is cut as :func:`prunus.apply` cuts it, which costs nothing on the meta device, and filled.
    A tensor that lies where the fresh one does takes its place as data of the same object; for one
    on the meta device there will be a new object.

    Raises
    ------
    PlanError
        If the plan is for another model.
    FormatError
        If the tensors are another model's.
    ApplyError
        If an attribute is not what the plan changes.
    """
    config = copy_config(model)
    if plan is not None and plan.drops:
        drop_blocks(model, plan.drops)
    if plan is not None:
        add_biases(model, plan.biases)
    modules = dict(model.named_modules(remove_duplicate=False))
    fresh = collect(model)
    _check_names(tensors, fresh)
    kinds = {**tensors.kinds, **fresh.kinds}
    written: Container[str] = () if plan is None else plan.written
    names = {
        first: [name for name in known if _has_place(modules, name, kinds[name], written)]
        for first, known in tensors.names().items()
    }
    unfilled = {name for name in fresh.values if _is_unfilled(modules, name)}
    checked = {n for n in kinds if kinds[n] in ("parameter", "buffer") and n not in unfilled}
    _tie(modules, fresh, names, kinds)
    if plan is not None:
        essence = _essence(plan.widths, kinds, unfilled)
        checked |= essence.shapes.keys()
        cut_own(essence, model)
        set_applied(model, Applied((plan,), config))
    now = _by_any_name(collect(model))
    for first, known in names.items():
        tensor = tensors.values[first]
        old = next((now[name] for name in known if name in now), None)
        if old is not None and not checked.isdisjoint(known):
            _check_shape(first, tensor, old, plan)
        if known:
            trained = first not in tensors.frozen and is_continuous(tensor)
            _fill(modules, known, tensor, old, kinds, trained)


def _tie(
    modules: Mapping[str, nn.Module],
    fresh: Tensors,
    names: Mapping[str, Sequence[str]],
    kinds: Mapping[str, Kind],
) -> None:
    """Let the names share tensors as they do in the file: a build may tie more of them or fewer."""
    old, shared = _by_any_name(fresh), fresh.names()
    for first, known in names.items():
        tensor = old.get(first)
        if tensor is None or set(shared[fresh.aliases.get(first, first)]) == set(known):
            continue
        if isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), tensor.requires_grad)
        for name in known:
            _put(modules, name, tensor, kinds[name])


def _fill(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    tensor: Tensor,
    old: Tensor | None,
    kinds: Mapping[str, Kind],
    trained: bool,
) -> None:
    """Put a tensor of the file in the places of these names, where ``old`` is."""
    if old is not None and is_continuous(old) != is_continuous(tensor):
        why = f"it is {tensor.dtype} in the file and {old.dtype} in the model"
        raise FormatError(_ANOTHER, where=names[0], why=why, fix=_FIX)
    if old is not None and old.device == tensor.device and old.layout == tensor.layout:
        old.data = tensor
        if isinstance(old, nn.Parameter):
            old.requires_grad_(trained)
        return
    if any(kinds[name] == "parameter" for name in names):
        tensor = nn.Parameter(tensor, requires_grad=trained)
    for name in names:
        _put(modules, name, tensor, kinds[name])


def _check_shape(name: str, tensor: Tensor, old: Tensor, plan: Plan | None) -> None:
    if tensor.shape != old.shape:
        why = f"it has shape {list(tensor.shape)} in the file and should have {list(old.shape)}"
        raise FormatError(
            _ANOTHER if plan is None else "the file's tensors are not those of its plan",
            where=name,
            why=why if plan is not None else f"{why}; the file has no plan",
            fix=_FIX if plan is not None else f"{_FIX}; or save a pruned copy with plan=",
        )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _kind(modules: Mapping[str, nn.Module], name: str) -> Kind:
    prefix, _, own = name.rpartition(".")
    module = modules[prefix]
    if own in module._parameters:
        return "parameter"
    if own in module._buffers:
        return "hidden" if own in module._non_persistent_buffers_set else "buffer"
    return "attribute"


def _by_any_name(tensors: Tensors) -> dict[str, Tensor]:
    tied = {name: tensors.values[first] for name, first in tensors.aliases.items()}
    return {**tensors.values, **tied}


def _essence(plan: Plan, kinds: Mapping[str, Kind], unfilled: Container[str] = ()) -> Plan:
    """Without the caches: plain attributes and hidden buffers that a forward may have changed.

    Parameters
    ----------
    kinds
        Of the names that are known; what a forward writes may be in no model and no file.
    unfilled
        Buffers that are made when they are filled.
    """
    written = plan.written
    cut = {axis.tensor for axis in plan.keep}

    def counts(name: str) -> bool:
        kind = kinds.get(name, "attribute" if name in written else "parameter")
        essential = kind in ("parameter", "buffer") or (kind == "hidden" and name in cut)
        return essential and name not in unfilled

    return replace(
        plan,
        keep={axis: stay for axis, stay in plan.keep.items() if counts(axis.tensor)},
        shapes={name: shape for name, shape in plan.shapes.items() if counts(name)},
    )


def check_cut(tensors: Tensors, plan: Plan) -> list[str]:
    """Names of tensors whose shapes are not those that the plan leaves."""
    given = {name: tuple(tensor.shape) for name, tensor in _by_any_name(tensors).items()}
    wanted = _essence(plan, tensors.kinds).resulting_shapes()
    return [name for name, shape in wanted.items() if given.get(name) != shape]


def _check_names(tensors: Tensors, fresh: Tensors) -> None:
    missing = _essential(fresh) - set(tensors.kinds)
    ours, theirs = (
        {name for name, kind in one.kinds.items() if kind == "parameter"}
        for one in (fresh, tensors)
    )
    surplus = theirs - ours
    missing |= (ours - theirs) & set(tensors.kinds)
    if missing or surplus:
        has = f"the file has no {_some(missing)}" if missing else ""
        lacks = f"the model has no {_some(surplus)}" if surplus else ""
        raise FormatError(_ANOTHER, why="; ".join(filter(None, (has, lacks))), fix=_FIX)


def _essential(tensors: Tensors) -> set[str]:
    return {name for name, kind in tensors.kinds.items() if kind in ("parameter", "buffer")}


def _some(names: Iterable[str], shown: int = 3) -> str:
    ordered = sorted(names)
    rest = len(ordered) - shown
    return ", ".join(ordered[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _has_place(
    modules: Mapping[str, nn.Module], name: str, kind: Kind, written: Container[str]
) -> bool:
    """Whether the model keeps a tensor of that name and kind; False for what a forward makes anew.

    Raises
    ------
    FormatError
        If it keeps something else there: nothing but tensors and None is ever replaced.
    """
    prefix, _, own = name.rpartition(".")
    module = modules.get(prefix)
    if module is None:
        raise FormatError(_ANOTHER, where=name, why=f"it has no module {prefix!r}", fix=_FIX)
    if kind == "parameter" and own in module._parameters:
        return True
    if own in module._buffers:
        return kind in ("buffer", "hidden")
    held = vars(module).get(own, _NOTHING)
    if own not in OF_EVERY_MODULE and kind == "attribute" and isinstance(held, (Tensor, NoneType)):
        return True
    passing = kind in ("attribute", "hidden") and own not in OF_EVERY_MODULE
    inherited = inspect.getattr_static(type(module), own, None)
    if passing and (name in written or (held is _NOTHING and inherited is None)):
        return False
    raise FormatError(
        _ANOTHER,
        where=name,
        why=f"it has no {kind} of that name"
        + ("" if held is _NOTHING else f", but a {type(held).__name__}"),
        fix=_FIX if held is _NOTHING else f"{_FIX}; before saving, reset what its forward writes",
    )


_NOTHING = object()


def _is_unfilled(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a buffer waits for its first data: it is empty, or a module resizes it at loading.

    Observers of quantization are such; their class says in ``_load_from_state_dict`` how they take
    a tensor of another size.
    """
    prefix, _, own = name.rpartition(".")
    module = modules[prefix]
    buffer = module._buffers.get(own)
    resizes = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return buffer is not None and buffer.numel() <= (1 if resizes else 0) and buffer.dim() < 2


def _put(modules: Mapping[str, nn.Module], name: str, tensor: Tensor, kind: Kind) -> None:
    """Where the module keeps it; :func:`_has_place` has found the place."""
    prefix, _, own = name.rpartition(".")
    module = modules[prefix]
    if kind == "parameter":
        if not isinstance(tensor, nn.Parameter):
            raise FormatError(_ANOTHER, where=name, why="it has no parameter there", fix=_FIX)
        setattr(module, own, tensor)  # a recurrent module keeps its weights in a list as well
    elif own in module._buffers:
        module._buffers[own] = tensor
    else:
        vars(module)[own] = tensor
