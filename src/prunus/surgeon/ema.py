"""An average of the weights (EMA) follows the model that it was taken of.

Averaged modules are found by their structure, whatever class holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import ApplyError
from prunus.surgeon.optimizer_state import like
from prunus.surgeon.snapshot import twins_of
from prunus.tracer.copies import duplicate

Memory = tuple[int, int, tuple[int, ...]]

_GONE = object()
"""In the place of a tensor whose block was dropped."""

_DEEPEST = 4
"""How many containers within containers of a holder are looked into."""


class Average:
    """What follows a model when it is cut: its averaged twins, and what their holder caches.

    Made before the cut.  Afterwards :func:`prunus.surgeon.apply.cut_along` cuts the twins.

    Parameters
    ----------
    model
        The plain module that will be cut.
    ema
        A module of the same structure, or any object that holds one: timm's ``ModelEmaV2`` and
        ``ModelEmaV3``, ``torch.optim.swa_utils.AveragedModel``, ultralytics' ``ModelEMA``.  None
        where there is no average.
    repaired
        Whether the weights of the model are repaired after the cut, which the twins follow.

    Attributes
    ----------
    twins
        The averaged modules.
    plain
        A copy of the uncut model, which shares its memory; None unless ``repaired``.

    Raises
    ------
    ApplyError
        If the object holds no module of the model's structure.
    """

    def __init__(self, model: nn.Module, ema: Any, *, repaired: bool = False) -> None:
        self._model, self._ema = model, ema
        self.twins = twins_of(model, ema)
        if ema is not None and not self.twins:
            raise ApplyError(
                f"ema= ({type(ema).__name__}) holds no module of the model's structure",
                why="its averaged weights are those of another model, or are kept in no module",
                fix="give the averaged module itself, of the same parameters as the model, or make "
                "a new average after the cut",
            )
        self.plain = duplicate(model, share=True) if repaired and self.twins else None
        self._before = [
            (tensor.detach(), module, name)
            for module, name, tensor in _tensors((model, *self.twins) if self.twins else ())
        ]

    def add_repair(self) -> None:
        """What the repair changed in the cut model, on top of the cut twins.

        Parameters move by the same difference.  Buffers (statistics of batch norms, which were
        measured with the repaired weights) are copied.
        """
        if self.plain is None:
            return
        cut = {name: tensor.detach() for name, _, _, tensor in _named(self.plain)}
        repaired = {
            name: tensor.detach()
            for name, _, _, tensor in _named(self._model)
            if not torch.equal(tensor, cut[name])
        }
        for twin in self.twins:
            for name, parameter in twin.named_parameters():  # of several names, once
                if name in repaired:
                    moved = (repaired[name] - cut[name]).to(parameter)
                    parameter.data = parameter.detach() + moved
            for name, module, own, tensor in list(_named(twin)):
                if name in repaired and own in module._buffers:
                    module._buffers[own] = repaired[name].to(tensor, copy=True)

    def renew_caches(self) -> None:
        """Point what the holder caches at the tensors that the cut has made.

        ultralytics' ``ModelEMA`` lists the tensors of both models at its first update, and would go
        on with the memory of before.
        """
        alive = {id(module) for one in (self._model, *self.twins) for module in one.modules()}
        now: dict[Memory, Any] = {}
        for old, module, name in self._before:
            new = module._parameters.get(name, module._buffers.get(name))
            if id(module) not in alive or new is None:
                now.setdefault(_memory(old), _GONE)
            elif _memory(new) != _memory(old):
                now[_memory(old)] = new.detach()
        held = getattr(self._ema, "__dict__", {})
        if now and not any(self._ema is twin for twin in self.twins):
            _renewed(held, now, -1)


def check_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Refuse a scheduler of another optimizer.

    One of this optimizer needs no change: groups of parameters stay the same objects, also one
    that loses all of its parameters.

    Raises
    ------
    ApplyError
    """
    if scheduler is None or optimizer is None:
        return
    driven = list(_driven(scheduler, 0))
    if driven and not any(one.param_groups is optimizer.param_groups for one in driven):
        raise ApplyError(
            f"scheduler= ({type(scheduler).__name__}) drives another optimizer",
            why=f"its optimizer is a {type(driven[0]).__name__} with other groups of parameters",
            fix="give the scheduler of optimizer=, or none; nothing was changed",
        )


def _driven(scheduler: Any, depth: int) -> Iterator[Any]:
    """The optimizers that a scheduler, or one inside of it, sets learning rates of."""
    held = getattr(scheduler, "__dict__", {})
    for name in ("optimizer", "optimizers"):
        found = held.get(name, ())
        for one in found if isinstance(found, (list, tuple)) else [found]:
            if hasattr(one, "param_groups"):
                yield one
    for name in ("scheduler", "schedulers", "_schedulers"):
        found = held.get(name, ())
        if depth < _DEEPEST:
            for one in found if isinstance(found, (list, tuple)) else [found]:
                yield from _driven(one, depth + 1)


def _renewed(value: Any, now: Mapping[Memory, Any], depth: int) -> Any:
    """A value whose tensors are those of now; lists and dicts are changed in place."""
    if isinstance(value, Tensor):
        return now.get(_memory(value), value) if value.layout == torch.strided else value
    if depth > _DEEPEST or not isinstance(value, (list, tuple, dict)):
        return value
    if isinstance(value, dict):
        for key, item in list(value.items()):
            later = _renewed(item, now, depth + 1)
            if later is _GONE:
                del value[key]
            elif later is not item:
                value[key] = later
        return value
    later = [_renewed(item, now, depth + 1) for item in value]
    if all(a is b for a, b in zip(value, later, strict=True)):
        return value
    left = [item for item in later if item is not _GONE]
    if isinstance(value, list):
        value[:] = left
        return value
    return like(value, left)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and buffers: the name, the module that holds it and its name there."""
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), module, name, tensor


def _tensors(models: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Strided parameters and buffers of models, with the modules that hold them."""
    for model in models:
        for _, module, name, tensor in _named(model):
            if tensor.layout == torch.strided and not tensor.is_meta:
                yield module, name, tensor


def _memory(tensor: Tensor) -> Memory:
    """What tells whether two tensors are the same piece of memory."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape)
