"""A model as it is at one moment, and the rule that a call changes all of it or nothing.

Which plans a model has been cut by is remembered here, not on the model, as long as it lives.
"""

from __future__ import annotations

import copy
import inspect
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunus.errors import PlanError
from prunus.graph.plans import Plan
from prunus.surgeon.switches import Switches, signals_deferred
from prunus.tracer.follow import is_config
from prunus.tracer.outside import restore_content
from prunus.tracer.precision import LOCK, let_go_of_lock, owns_lock
from prunus.tracer.quiet import Contents, is_odd
from prunus.tracer.wrappers import unwrapped, unwraps


@dataclass(frozen=True)
class Applied:
    """The plans that were applied to a model, the first one first.

    ``config`` is a copy of what its config said before the first of them.
    """

    plans: tuple[Plan, ...]
    config: Any


_APPLIED: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()
"""A copy of a model is another model, of which nothing is known."""


def set_applied(model: nn.Module, applied: Applied | None) -> None:
    """What is to be known of a model, instead of what was."""
    if applied is None:
        _APPLIED.pop(model, None)
    elif _APPLIED.get(model) is not applied:
        _APPLIED[model] = applied


def copy_config(model: nn.Module) -> Any:
    """A copy of the config that a model keeps, before it is cut.

    None if it keeps none, or one that can't be copied.
    """
    config = getattr(model, "__dict__", {}).get("config")
    try:
        return copy.deepcopy(config) if is_config(config) else None
    except Exception:  # a class may refuse with any error
        return None


def config_before(model: nn.Module) -> Any:
    """What the config said before the first cut: the present one, if nothing was cut."""
    applied = _APPLIED.get(model)
    return copy_config(model) if applied is None else applied.config


def remember(model: nn.Module, plan: Plan, config: Any) -> None:
    """Note that a plan has been applied, after those before it; ``config`` is from before it."""
    known = _APPLIED.get(model) or Applied((), config)
    _APPLIED[model] = Applied((*known.plans, plan), known.config)


def applied_plan(model: nn.Module) -> Plan | None:
    """What has been applied to the model in this process, as one plan for the original.

    Raises
    ------
    PlanError
        If the plans don't follow one another, or only a part of the model was cut.
    """
    applied = _APPLIED.get(model)
    if applied is None:
        for name, part in model.named_modules():
            if part in _APPLIED:
                raise PlanError(
                    "a plan for a part of this model has been applied, none for all of it",
                    where=name,
                    fix="save that part, or trace, plan and cut the model as a whole",
                )
        return None
    return reduce(Plan.then, applied.plans)


P = ParamSpec("P")
Result = TypeVar("Result")

_DEEPEST = 8
"""How many containers within containers are looked into."""

_TORCH = os.path.dirname(torch.__file__)

_PLAIN = (int, float, str, bool, bytes, type(None))


def all_or_nothing(verb: Callable[P, Result]) -> Callable[P, Result]:
    """Make a function that changes its argument ``model`` all or nothing.

    Whatever is raised within, ``KeyboardInterrupt`` and ``MemoryError`` included, the model is then
    as it was before the call, and so are the ``optimizer`` and the ``ema`` if the function is given
    them.  The call has succeeded once the function returns.  One thread at a time is in such a
    call; wrappers around the model are taken off (:mod:`prunus.tracer.wrappers`).
    """
    names = list(inspect.signature(verb).parameters)
    place = names.index("model")

    @unwraps
    @wraps(verb)
    def whole(*args: P.args, **kwargs: P.kwargs) -> Result:
        model: Any = args[place] if len(args) > place else kwargs.get("model")
        if not issubclass(type(model), nn.Module):
            return verb(*args, **kwargs)  # which says itself what is wrong
        found: list[Any] = []
        outermost = not owns_lock()
        try:
            with LOCK:  # switches are those of the whole process
                found += [Switches(), Snapshot(model, kwargs.get("optimizer"), kwargs.get("ema"))]
                try:
                    return verb(*args, **kwargs)
                except BaseException as error:
                    _put_back(error, *found)
                    raise
        except BaseException as error:
            # A second interrupt may have come before or during the above: restoring is idempotent.
            with LOCK:
                if found:
                    _put_back(error, *found)
            if outermost:  # only here: a call that has succeeded must not be interrupted any more
                let_go_of_lock()
            interrupt = _interrupt_behind(error)
            if interrupt is not None:
                raise interrupt from error
            raise

    return whole


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that fell into PyTorch's own bookkeeping, which failed over it."""
    frames = traceback.extract_tb(error.__traceback__)
    if type(error) is not RuntimeError or not frames[-1].filename.startswith(_TORCH):
        return None
    before = error.__context__
    return before if isinstance(before, KeyboardInterrupt) else None


def _put_back(error: BaseException, switches: Switches, before: Snapshot) -> None:
    """Undo all of a call that raised an error."""
    if not isinstance(error, Exception):
        # An interrupt may fall between the start of a context manager and the block that it guards.
        # Such a generator ends, with what it holds, when the frame that started it is cleared.
        traceback.clear_frames(error.__traceback__)
    switches.restore()  # first, as a mode that is left on would see what follows
    before.restore()


class Snapshot:
    """Everything of a model, its optimizer and its average that Prunus may change, as it is now.

    Kept are classes, attributes and hooks of modules, the contents of their dicts, lists, sets and
    config objects, the memory, gradient and ``requires_grad`` of every tensor, param groups and
    states of the optimizer, and the plans that were applied.  The values of buffers and tensor
    attributes are copied, since a forward may write them in place; of parameters only those that
    PyTorch itself writes (embeddings with ``max_norm``).  For all others the memory is kept as it
    is, so new values have to go into new memory (``parameter.data = …``).
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, ema: Any = None) -> None:
        self._model = model
        self._applied: Applied | None = _APPLIED.get(model)
        self._modules = [(module, type(module)) for module in model.modules()]
        walk = _Walk()
        for module, _ in self._modules:
            walk.into(vars(module), 0)
        self._tensors = [_Memory(tensor) for tensor in walk.tensors.values()]
        self._contents = Contents(module for module, _ in self._modules)
        if optimizer is not None:
            walk.into(optimizer, 0)
        walk.into(getattr(ema, "__dict__", {}), 0)
        self._twins = [Snapshot(twin) for twin in twins_of(model, ema)]
        self._containers = walk.containers

    def restore(self) -> None:
        """Put everything back; may be called again, and later than signals want it to end."""
        with signals_deferred():
            for module, kind in self._modules:
                if type(module) is not kind:
                    object.__setattr__(module, "__class__", kind)
            for container, content in self._containers:
                restore_content(container, content)
            for memory in self._tensors:
                memory.restore()
            self._contents.restore()
            set_applied(self._model, self._applied)
            for twin in self._twins:
                twin.restore()


def twins_of(model: nn.Module, ema: Any) -> list[nn.Module]:
    """The averaged modules that an object is or holds: those with the model's parameters."""
    if ema is None:
        return []
    shapes = _shapes(model)
    held = (ema, *getattr(ema, "__dict__", {}).values())
    if isinstance(ema, nn.Module):
        held = (*held, *ema._modules.values())
    found: dict[int, nn.Module] = {}
    for one in held:
        module = unwrapped(one) if isinstance(one, nn.Module) else None
        if module is not None and module is not model and _shapes(module) == shapes:
            found[id(module)] = module
    return list(found.values())


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in model.named_parameters(remove_duplicate=False)}


class _Walk:
    """Collects the containers that can be reached, with their contents, and the tensors in them."""

    def __init__(self) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def into(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, (dict, list, set, deque)):
            content: Any = dict(value) if isinstance(value, dict) else list(value)
            self.containers.append((value, content))
            self._all(list(value.values()) if isinstance(value, dict) else content, depth)
        elif isinstance(value, tuple):
            self._all(value, depth)
        elif isinstance(value, torch.optim.Optimizer) or is_config(value):
            self.into(vars(value), depth)

    def _all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if not isinstance(value, _PLAIN):
                self.into(value, depth + 1)


class _Memory:
    """What a tensor object points at, and its gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.data
        self._leaf = tensor.is_leaf
        self._grad = tensor.grad if self._leaf else None
        self._trained = tensor.requires_grad

    def restore(self) -> None:
        tensor = self._tensor
        if not _same_memory(tensor.data, self._data):
            if self._leaf:
                tensor.grad = None  # of another shape, which torch refuses beside the new data
            replace_data(tensor, self._data)
        if self._leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad
        if self._leaf and tensor.requires_grad != self._trained:
            tensor.requires_grad_(self._trained)


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Other data for the same tensor object.

    Autograd remembers a parameter's shape as long as anything of an old graph is alive (a loss
    that is still in scope, say), and forgets it when the type changes in between.
    """
    if data.is_floating_point() and tensor.shape != data.shape:
        other = torch.float32 if data.dtype == torch.float16 else torch.float16
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


def own_data(tensor: Tensor) -> Tensor:
    """The tensor, with its values in new memory, in which they may be changed in place."""
    tensor.data = tensor.detach().clone()
    return tensor


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape, a.layout, a.device) != (b.dtype, b.shape, b.layout, b.device):
        return False
    if is_odd(a):
        return False
    return (a.stride(), a.storage_offset(), a.untyped_storage()._cdata) == (
        b.stride(),
        b.storage_offset(),
        b.untyped_storage()._cdata,
    )
