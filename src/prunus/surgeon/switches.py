"""What belongs to the whole process: PyTorch's switches, and signals."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils._python_dispatch as dispatch
from torch.nn.modules import module as modules

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")

_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_rng_state, torch.set_rng_state),
    (lambda: logging.root.manager.disable, logging.disable),
    (lambda: _LOGGER.disabled, lambda disabled: setattr(_LOGGER, "disabled", disabled)),
)
"""How each is read and set."""


class Switches:
    """Settings of the process and the thread that Prunus changes for a while, as they are now.

    An interrupt may come between a switch and the ``try`` that would switch it back.
    """

    def __init__(self) -> None:
        self._values = [read() for read, _ in _SWITCHES]
        self._modes = list(dispatch._get_current_dispatch_mode_stack())
        self._in_modes = {n: v for n, v in vars(dispatch).items() if isinstance(v, bool)}
        self._function_modes = torch._C._len_torch_function_stack()
        self._filters = list(warnings.filters)
        self._hooks = [(hooks, dict(hooks)) for hooks in _hooks_of_all_modules()]

    def restore(self) -> None:
        """Set what has changed back; may be called again."""
        with signals_deferred():
            for mode in reversed(dispatch._get_current_dispatch_mode_stack()):
                if not any(mode is one for one in self._modes):
                    _leave(mode)
            _enter_again(self._modes)
            while torch._C._len_torch_function_stack() > self._function_modes:
                torch._C._pop_torch_function_stack()
            vars(dispatch).update(self._in_modes)
            for (_, write), value in zip(_SWITCHES, self._values, strict=True):
                write(value)
            if warnings.filters != self._filters:
                warnings.filters[:] = self._filters  # type: ignore[index]
                warnings._filters_mutated()  # type: ignore[attr-defined]
            for hooks, before in self._hooks:
                if list(hooks) != list(before):
                    hooks.clear()
                    hooks.update(before)


def _leave(mode: Any) -> None:
    """Take a mode off that was entered and never left; PyTorch's own have places by their kind."""
    key = getattr(mode, "_mode_key", None)
    if key is None:
        torch._C._pop_torch_dispatch_stack(None)
    else:
        torch._C._unset_dispatch_mode(key)


def _enter_again(modes: list[Any]) -> None:
    """A mode of PyTorch's own takes the place of another of its kind, until it is left."""
    now = dispatch._get_current_dispatch_mode_stack()
    for mode in modes:
        own = getattr(mode, "_mode_key", None) is not None
        if own and not any(mode is one for one in now):
            torch._C._set_dispatch_mode(mode)


def _hooks_of_all_modules() -> list[dict[int, Any]]:
    """PyTorch's hooks on every module there is."""
    found = (getattr(modules, name) for name in dir(modules) if name.startswith("_global_"))
    return [one for one in found if isinstance(one, dict)]


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Within the context no signal's handler runs; those that came run afterwards.

    Python runs handlers in the main thread alone, so that others need no protection.
    """
    came: list[int] = []
    before: dict[signal.Signals | int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler) and not isinstance(handler, signal.Handlers):
                    before[number] = handler
                    signal.signal(number, note)
        yield
    finally:
        try:
            _set(before)
        finally:
            _set(before)  # the first handler that is back may have raised
        for late in came:
            signal.raise_signal(late)


def _set(handlers: dict[signal.Signals | int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
