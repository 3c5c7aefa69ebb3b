"""Contexts in which a model runs for us: quietly, alone, and without leaving a trace."""

from __future__ import annotations

import copy
import gc
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from prunus.graph.program import modules_in
from prunus.tracer.follow import marked_objects
from prunus.tracer.outside import Outside, restore_content
from prunus.tracer.precision import LOCK, same_draws

SMALL = 1 << 18
"""Bytes of a memory that a run of ours looks after; the observers of QAT write to less."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from walking what is only growing: a third of the time of a trace."""
    with LOCK:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


@contextmanager
def quiet_run(model: nn.Module, *, users_own: bool = False, copies: bool = True) -> Iterator[None]:
    """Eval mode, no gradients, no fast path; everything touched is put back afterwards.

    Modules that cache tensors during a forward get their attributes back, small buffers their
    values, hooks and functions the containers that they have filled, and the model gets copies of
    its inputs, since it may write to them; not so where the run is the user's own.

    Parameters
    ----------
    copies
        False for who gives the model copies anyway: those that are made at every call take time
        and memory that what is measured would count, and a trace can't follow them.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    restored: list[_Snapshot | Contents | Outside] = [*map(_Snapshot, modules)]
    settings = [(values, dict(values)) for values in marked_objects(modules)]
    if not users_own:
        restored += [Contents(modules, SMALL), Outside(modules)]
    try:
        if copies and not users_own and not isinstance(model, torch.jit.ScriptModule):
            model.register_forward_pre_hook(_copy_inputs, prepend=True, with_kwargs=True)
        with quiet():
            model.eval()
            yield
    finally:
        for one in restored:
            one.restore()
        for values, saved in settings:
            values.clear()
            values.update(saved)
        for module, mode in modes:
            module.training = mode


def _copy_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """For a forward to write to."""
    return copied_inputs((args, kwargs))


def copied_inputs(inputs: Any) -> Any:
    """The same containers of other tensors and objects; one that is given twice stays one.

    A forward may write to an object as well: a cache of keys and values grows with every run.
    """
    memo: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if id(value) not in memo and isinstance(value, Tensor):
            memo[id(value)] = value.detach().clone()
        elif id(value) not in memo and not isinstance(value, _SHARED):
            try:
                return copy.deepcopy(value, memo)
            except Exception:  # locks, handles, tensors with a history: not everything has a copy
                return value
        return memo.get(id(value), value)

    with _disable_current_modes():  # which count what the forward does
        return tree_map(copied, inputs)


_SHARED = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum, range, slice),
    *(torch.dtype, torch.device, torch.Generator, nn.Module, FunctionType, MethodType),
)
"""Inputs that a forward does not change, or that stand for themselves."""


@contextmanager
def quiet() -> Iterator[None]:
    """Alone, without gradients, warnings and fast path; the random state is put back.

    The fast path of multi-head attention hides what it computes.
    """
    with same_draws(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def same_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Train and eval modes are put back afterwards."""
    modes = {module: module.training for module in modules}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Without oneDNN and cuDNN, whose recurrent kernels say nothing of what they consist of."""
    with LOCK:
        onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        try:
            torch._C._set_mkldnn_enabled(False)
            torch._C._set_cudnn_enabled(False)
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)
            torch._C._set_cudnn_enabled(cudnn)


_KINDS = (Tensor, nn.Parameter)
"""Classes of tensors that are one array in one storage, if they are strided."""


class Contents:
    """What is in the memory of a model's buffers and tensor attributes, as it is now.

    Of parameters only those are copied that PyTorch's own forwards write (embeddings with
    ``max_norm``): no other module changes a weight by being run.

    Parameters
    ----------
    largest
        The most bytes of a memory that is looked at.
    """

    def __init__(self, modules: Iterable[nn.Module], largest: float = math.inf) -> None:
        found = (storage for storage in _storages(modules) if storage.nbytes() <= largest)
        self._saved = [(storage, storage.clone()) for storage in found]

    def restore(self) -> None:
        """Put the bytes back where any was changed; may be called again."""
        for storage, values in self._saved:
            if storage.nbytes() != values.nbytes():  # the observers of QAT resize their buffers
                storage.resize_(values.nbytes())
            elif torch.equal(_bytes(storage), _bytes(values)):
                continue
            storage.copy_(values)


def _storages(modules: Iterable[nn.Module]) -> Iterator[Any]:
    seen: set[int] = set()
    for module in modules:
        for tensor in _written(module):
            if type(tensor) not in _KINDS or tensor.is_meta or is_odd(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _written(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of one module, also those in its lists and dicts, that a forward may write into."""
    parameters = () if vars(module).get("max_norm") is None else module._parameters.values()
    yield from (one for one in (*module._buffers.values(), *parameters) if one is not None)
    for value in vars(module).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if type(item) is Tensor)


def is_odd(tensor: Tensor) -> bool:
    """Whether it is not one strided array in one storage."""
    return tensor.layout != torch.strided or tensor.is_nested


class _Snapshot:
    """A module's attributes and the contents of its containers, to be put back in place.

    Containers stay the same objects, since hook handles and other modules may point at them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._saved = dict(self._attributes)
        held = [v for v in self._saved.values() if isinstance(v, (dict, list, set))]
        self._empty = [container for container in held if not container]
        self._contents = [(container, container.copy()) for container in held if container]

    def restore(self) -> None:
        """Undo what was set, added or removed since."""
        self._attributes.clear()
        self._attributes.update(self._saved)
        for container in self._empty:
            if container:
                container.clear()
        for container, content in self._contents:
            restore_content(container, content)


@contextmanager
def follow_modules(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the module that is running on top of ``stack``."""
    handles: list[Any] = []

    def follow(path: str, module: nn.Module) -> None:
        def enter(_: nn.Module, __: Any) -> None:
            stack.append(path)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))

    compiled: dict[int, str] = {}
    try:
        for path, module in modules_in(model):
            if isinstance(module, torch.jit.ScriptModule):
                compiled[id(module)] = path
            else:
                follow(path, module)
        if compiled:
            handles += _follow_compiled(compiled, stack)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _follow_compiled(paths: Mapping[int, str], stack: list[str]) -> list[Any]:
    """The same for ScriptModules, which take no hooks of their own: by hooks of all modules."""
    thread = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in paths and threading.get_ident() == thread:
            stack.append(paths[id(module)])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in paths and threading.get_ident() == thread:
            stack.pop()

    return [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]


ALL_TRUE = torch.ops.aten.ones_like.default
"""What stands before the question which entries are true, where all are to be visited."""


def asks_which(func: Any, args: Any) -> bool:
    """Whether an operator asks which entries of a boolean vector are true."""
    if func is not torch.ops.aten.nonzero.default:
        return False
    return bool(args[0].dim() == 1 and args[0].dtype == torch.bool)


def visits(model: nn.Module) -> dict[str, frozenset[int]]:
    """By path of a module: how many experts it may hold, in lists or in weights that stack them.

    Code that visits those that some token was routed to asks which entries of a vector as long are
    true (some count one more, for no expert).  Another input, or the same with an expert that is
    never picked, answers otherwise and runs another path.  So a trace on real tensors visits all:
    one without tokens adds nothing.  Where it does, the dense replay differs from the model.
    """
    found = {}
    for path, module in modules_in(model):
        lists = [
            m for m in (module, *module.children()) if isinstance(m, (nn.ModuleList, nn.ModuleDict))
        ]
        stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        counts = {len(one) for one in (*lists, *stacks)} - {0, 1}
        found[path] = frozenset(counts | {count + 1 for count in counts})
    return found
