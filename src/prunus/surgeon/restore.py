"""Turn a freshly built model into one that was pruned: set attributes, put its tensors in place."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from prunus.errors import ApplyError, FormatError
from prunus.graph.plans import Edit, Plan
from prunus.graph.program import state_of
from prunus.surgeon.apply import check_edits
from prunus.surgeon.biases import add_biases
from prunus.surgeon.depth import drop_blocks
from prunus.surgeon.own_copies import own_copies
from prunus.surgeon.reach import OF_EVERY_MODULE, write_attribute

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
    """Make a fresh copy of the original the pruned model, in place, without computing anything.

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
    if plan is not None and plan.drops:
        drop_blocks(model, plan.drops)
    if plan is not None:
        add_biases(model, plan.biases)
    modules = dict(model.named_modules(remove_duplicate=False))
    fresh = collect(model)
    places = {**tensors.kinds, **fresh.kinds}
    written: Container[str] = () if plan is None else plan.written
    unfilled = {name for name in fresh.values if _is_unfilled(modules, name)}
    if plan is not None:
        shapes = {n: tuple(t.shape) for n, t in _by_any_name(fresh).items()}
        shapes.update((name, plan.shapes[name]) for name in unfilled & plan.shapes.keys())
        _essence(plan, places).check_model(shapes)
        check_edits(plan, modules)
    _check_names(tensors, fresh)
    _check_shapes(tensors, fresh, plan, unfilled)
    names = {
        first: [name for name in known if _has_place(modules, name, places[name], written)]
        for first, known in tensors.names().items()
    }
    if plan is not None:
        own_copies(model, plan.edits)
    for edit in plan.edits if plan is not None else ():
        _write(modules[edit.module], edit)
    old, holders = _by_any_name(fresh), _names_by_object(fresh)
    for first, tensor in tensors.values.items():
        if not names[first]:
            continue
        trained = first not in tensors.frozen and _is_continuous(tensor)
        before = old.get(first)
        if before is not None and _is_continuous(before) != _is_continuous(tensor):
            why = f"it is {tensor.dtype} in the file and {before.dtype} in the model"
            raise FormatError(_ANOTHER, where=first, why=why, fix=_FIX)
        if _can_take(before, tensor) and holders[id(before)] == set(names[first]):
            before.data = tensor
            if isinstance(before, nn.Parameter):
                before.requires_grad_(trained)
            continue
        if any(places[name] == "parameter" for name in names[first]):
            tensor = nn.Parameter(tensor, requires_grad=trained)
        for name in names[first]:
            _put(modules, name, tensor, places[name])


def _can_take(old: Tensor | None, new: Tensor) -> TypeGuard[Tensor]:
    """Whether the data of a tensor can be replaced, so that it stays the same object."""
    return old is not None and old.device == new.device and old.layout == new.layout


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _write(module: nn.Module, edit: Edit) -> None:
    try:
        write_attribute(module, edit.attribute, edit.after)
    except Exception as error:  # a property may raise anything
        raise ApplyError(
            f"{edit.module}.{edit.attribute} can't be set",
            where=edit.module,
            why=f"{type(error).__name__}: {error}",
            fix=_FIX,
        ) from error


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


def _names_by_object(tensors: Tensors) -> dict[int, set[str]]:
    names: dict[int, set[str]] = {}
    for name, tensor in _by_any_name(tensors).items():
        names.setdefault(id(tensor), set()).add(name)
    return names


def _essence(plan: Plan, kinds: Mapping[str, Kind]) -> Plan:
    """Without the caches: plain attributes and hidden buffers that a forward may have changed.

    Parameters
    ----------
    kinds
        Of the names that are known; what a forward writes may be in no model and no file.
    """
    written = plan.written
    cut = {axis.tensor for axis in plan.keep}

    def counts(name: str) -> bool:
        kind = kinds.get(name, "attribute" if name in written else "parameter")
        return kind in ("parameter", "buffer") or (kind == "hidden" and name in cut)

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


def _check_shapes(
    tensors: Tensors, fresh: Tensors, plan: Plan | None, unfilled: Container[str]
) -> None:
    """Every tensor has the shape that the plan leaves; those that it doesn't know, their own."""
    left = {} if plan is None else _essence(plan, tensors.kinds).resulting_shapes()
    whole = {
        name: tuple(tensor.shape)
        for name, tensor in _by_any_name(fresh).items()
        if fresh.kinds[name] in ("parameter", "buffer") and name not in unfilled
    }
    for first, names in tensors.names().items():
        shape = tuple(tensors.values[first].shape)
        # A build may tie fewer tensors than the model had; what the plan says counts for all.
        wanted = [left[n] for n in names if n in left] or [whole[n] for n in names if n in whole]
        if wanted and shape != wanted[0]:
            told = f"it has shape {list(shape)} in the file and should have {list(wanted[0])}"
            raise FormatError(
                _ANOTHER if plan is None else "the file's tensors are not those of its plan",
                where=first,
                why=told if plan is not None else f"{told}; the file has no plan",
                fix=_FIX if plan is not None else f"{_FIX}; or save a pruned copy with plan=",
            )


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
