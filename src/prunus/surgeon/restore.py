"""Turn a freshly built model into one that was pruned: set attributes, put its tensors in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn

from prunus.errors import ApplyError, FormatError
from prunus.plans import Edit, Plan
from prunus.surgeon.apply import check_edits
from prunus.surgeon.biases import add_biases
from prunus.surgeon.depth import drop_blocks
from prunus.surgeon.reach import write_attribute
from prunus.tracer.program import state_of

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
        Of every name, other names as well.
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


def collect(model: nn.Module) -> Tensors:
    """The tensors of a model, where they are."""
    state, aliases = state_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {name: _kind(modules, name) for name in (*state, *aliases)}
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
    shapes = {n: tuple(t.shape) for n, t in _by_any_name(fresh).items()}
    if plan is not None:
        _essence(plan, tensors.kinds).check_model(shapes)
        check_edits(plan, modules)
    _check_names(tensors, fresh)
    _check_shapes(tensors, fresh, plan)
    for edit in plan.edits if plan is not None else ():
        _write(modules[edit.module], edit)
    places = {**tensors.kinds, **fresh.kinds}
    old, holders = _by_any_name(fresh), _names_by_object(fresh)
    names = tensors.names()
    for first, tensor in tensors.values.items():
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
    """Without the caches: plain attributes and hidden buffers that a forward may have changed."""
    cut = {axis.tensor for axis in plan.keep}

    def counts(name: str) -> bool:
        kind = kinds.get(name, "parameter")
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
    surplus = {name for name, kind in tensors.kinds.items() if kind == "parameter"} - {
        name for name, kind in fresh.kinds.items() if kind == "parameter"
    }
    if missing or surplus:
        has = f"the file has no {_some(missing)}" if missing else ""
        lacks = f"the model has no {_some(surplus)}" if surplus else ""
        raise FormatError(_ANOTHER, why="; ".join(filter(None, (has, lacks))), fix=_FIX)


def _check_shapes(tensors: Tensors, fresh: Tensors, plan: Plan | None) -> None:
    """Every tensor has the shape that the plan leaves; those that it doesn't know, their own."""
    left = {} if plan is None else _essence(plan, tensors.kinds).resulting_shapes()
    whole = {
        name: tuple(tensor.shape)
        for name, tensor in _by_any_name(fresh).items()
        if fresh.kinds[name] in ("parameter", "buffer")
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


def _put(modules: Mapping[str, nn.Module], name: str, tensor: Tensor, kind: Kind) -> None:
    """Where the module keeps it; nothing but tensors and None is ever replaced."""
    prefix, _, own = name.rpartition(".")
    module = modules.get(prefix)
    if module is None:
        raise FormatError(_ANOTHER, where=name, why=f"it has no module {prefix!r}", fix=_FIX)
    stores = {"parameter": module._parameters, "attribute": vars(module)}
    store: dict[str, Any] = stores.get(kind, module._buffers)
    if own in store:
        replaceable = store[own] is None or isinstance(store[own], Tensor)
    else:
        inherited = inspect.getattr_static(module, own, None)
        replaceable = kind != "parameter" and own.isidentifier() and not own.startswith("__")
        replaceable = replaceable and (inherited is None or isinstance(inherited, Tensor))
    if not replaceable or (kind == "parameter" and not isinstance(tensor, nn.Parameter)):
        raise FormatError(_ANOTHER, where=name, why=f"it has no {kind} of that name", fix=_FIX)
    if kind == "parameter":
        setattr(module, own, tensor)  # a recurrent module keeps its weights in a list as well
    elif kind == "attribute":
        vars(module)[own] = tensor
    elif own in store:
        store[own] = tensor
    else:
        module.register_buffer(own, tensor, persistent=kind == "buffer")
