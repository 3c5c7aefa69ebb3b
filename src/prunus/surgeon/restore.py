"""Turn a freshly built model into one that was pruned: set attributes, put its tensors in place."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.errors import FormatError, first_names
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon.apply import cut_own
from prunus.surgeon.depth import drop_blocks
from prunus.surgeon.reach import OF_EVERY_MODULE
from prunus.surgeon.saving import guard_saving
from prunus.surgeon.snapshot import Applied, copy_config, set_applied
from prunus.surgeon.tensors import add_biases, is_continuous

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
    for name in _of_kind(kinds, "attribute", "hidden") & state.keys():
        if name in written or not _is_dense(state[name]):
            del state[name]
    aliases = {name: first for name, first in aliases.items() if first in state}
    parameters = _of_kind(kinds, "parameter") & state.keys()
    frozen = frozenset(name for name in parameters if not state[name].requires_grad)
    return Tensors(state, aliases, kinds, frozen)


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
    if plan is not None:
        if plan.drops:
            drop_blocks(model, plan.drops)
        add_biases(model, plan.biases)
    target = _Target(model, tensors, () if plan is None else plan.written)
    target.tie()
    if plan is not None:
        essence = _essence(plan.widths, target.kinds, target.unfilled)
        target.checked |= essence.shapes.keys()
        cut_own(essence, model)
        set_applied(model, Applied((plan,), config))
        guard_saving(model)
    target.fill(plan)


class _Target:
    """A fresh model, and where it keeps the tensors of a file.

    Attributes
    ----------
    kinds
        Of all names of the file and the model.
    unfilled
        Buffers that wait for their first data.
    checked
        Names of tensors that have to be of the size that the model has there.
    """

    def __init__(self, model: nn.Module, tensors: Tensors, written: Container[str]) -> None:
        self._model, self._tensors, self._written = model, tensors, written
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._fresh = collect(model)
        _check_names(tensors, self._fresh)
        self.kinds = {**tensors.kinds, **self._fresh.kinds}
        self.unfilled = {name for name in self._fresh.values if _is_unfilled(self._modules, name)}
        self.checked = _of_kind(self.kinds, "parameter", "buffer") - self.unfilled
        self._names = {
            first: [name for name in known if self._has_place(name)]
            for first, known in tensors.names().items()
        }

    def tie(self) -> None:
        """Let names share tensors as they do in the file: a build may tie more of them or fewer."""
        old, shared = _by_any_name(self._fresh), self._fresh.names()
        for first, known in self._names.items():
            tensor = old.get(first)
            if tensor is None or set(shared[self._fresh.aliases.get(first, first)]) == set(known):
                continue
            made = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, tensor.requires_grad)
            self._put(known, made)

    def fill(self, plan: Plan | None) -> None:
        """Put every tensor in its places."""
        now = _by_any_name(collect(self._model))
        for first, known in self._names.items():
            tensor = self._tensors.values[first]
            old = next((now[name] for name in known if name in now), None)
            if old is not None and not self.checked.isdisjoint(known):
                _check_shape(first, tensor, old, plan)
            self._replace(known, old, tensor, trained=first not in self._tensors.frozen)

    def _replace(
        self, names: Sequence[str], old: Tensor | None, tensor: Tensor, *, trained: bool
    ) -> None:
        trained = trained and is_continuous(tensor)
        if old is not None and is_continuous(old) != is_continuous(tensor):
            why = f"it is {tensor.dtype} in the file and {old.dtype} in the model"
            raise FormatError(_ANOTHER, where=names[0], why=why, fix=_FIX)
        if old is not None and old.device == tensor.device and old.layout == tensor.layout:
            old.data = tensor
            if isinstance(old, nn.Parameter):
                old.requires_grad_(trained)
            return
        if any(self.kinds[name] == "parameter" for name in names):
            tensor = nn.Parameter(tensor, requires_grad=trained)
        self._put(names, tensor)

    def _put(self, names: Sequence[str], tensor: Tensor) -> None:
        """Where modules keep it; :meth:`_has_place` has found the places."""
        for name in names:
            prefix, _, own = name.rpartition(".")
            module: Any = self._modules[prefix]
            if self.kinds[name] != "parameter":
                store = module._buffers if own in module._buffers else vars(module)
                store[own] = tensor
            elif isinstance(tensor, nn.Parameter):
                setattr(module, own, tensor)  # a recurrent module keeps its weights in a list too
            else:
                raise FormatError(_ANOTHER, where=name, why="it has no parameter there", fix=_FIX)

    def _has_place(self, name: str) -> bool:
        """Whether there is a tensor of that name and kind; False for what a forward makes anew.

        Raises
        ------
        FormatError
            If the model keeps something else there: only tensors and None are ever replaced.
        """
        prefix, _, own = name.rpartition(".")
        kind, module = self.kinds[name], self._modules.get(prefix)
        if module is None:
            raise FormatError(_ANOTHER, where=name, why=f"it has no module {prefix!r}", fix=_FIX)
        if kind == "parameter" and own in module._parameters:
            return True
        if own in module._buffers:
            return kind in ("buffer", "hidden")
        held = vars(module).get(own, _NOTHING)
        if kind not in ("attribute", "hidden") or own in OF_EVERY_MODULE:
            raise _nothing_there(name, kind, held)
        return _has_attribute(module, name, kind, held, self._written)


def _has_attribute(
    module: nn.Module, name: str, kind: Kind, held: Any, written: Container[str]
) -> bool:
    if kind == "attribute" and isinstance(held, (Tensor, NoneType)):
        return True
    inherited = inspect.getattr_static(type(module), name.rpartition(".")[2], None)
    if name not in written and (held is not _NOTHING or inherited is not None):
        raise _nothing_there(name, kind, held)
    return False


def _nothing_there(name: str, kind: Kind, held: Any) -> FormatError:
    why = f"it has no {kind} of that name"
    if held is _NOTHING:
        return FormatError(_ANOTHER, where=name, why=why, fix=_FIX)
    fix = f"{_FIX}; before saving, reset what its forward writes"
    return FormatError(_ANOTHER, where=name, why=f"{why}, but a {type(held).__name__}", fix=fix)


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
    ours, theirs = _of_kind(fresh.kinds, "parameter"), _of_kind(tensors.kinds, "parameter")
    missing = _of_kind(fresh.kinds, "parameter", "buffer") - tensors.kinds.keys()
    missing |= (ours - theirs) & tensors.kinds.keys()
    surplus = theirs - ours
    if missing or surplus:
        has = f"the file has no {first_names(sorted(missing))}" if missing else ""
        lacks = f"the model has no {first_names(sorted(surplus))}" if surplus else ""
        raise FormatError(_ANOTHER, why="; ".join(filter(None, (has, lacks))), fix=_FIX)


def _of_kind(names: Mapping[str, Kind], *kinds: Kind) -> set[str]:
    return {name for name, kind in names.items() if kind in kinds}


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
