"""Interrupt a call at a chosen point, and tell whether anything was changed by it."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from prunus.errors import PrunusError
from prunus.surgeon import applied_plan

_HOME = str(Path(prunus.__file__).parent)


class Interrupted:
    """Raises an error when the n-th line of Prunus's own code is about to run; counts the lines.

    Lines that run while another error is handled are counted as well.
    """

    def __init__(self, line: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.lines, self._line, self._error = 0, line, error

    def __enter__(self) -> Interrupted:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._each if frame.f_code.co_filename.startswith(_HOME) else None

    def _each(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._line:
                raise self._error(f"line {frame.f_lineno} of {frame.f_code.co_filename}")
        return self._each


def lines_of(call: Callable[[], Any]) -> int:
    """How many lines of Prunus's own code a call runs."""
    with Interrupted() as counter:
        call()
    return counter.lines


@contextmanager
def signal_after(seconds: float) -> Iterator[None]:
    """A signal, after some time, that raises ``KeyboardInterrupt`` at whatever bytecode runs."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fingerprint(model: nn.Module, optimizer: Any = None) -> list[Any]:
    """All that a failed call has to leave alone, down to identities, order, bytes and strides."""
    seen: dict[int, int] = {}
    found: list[Any] = []
    try:
        plan = applied_plan(model)
    except PrunusError:
        plan = None
    for module in model.modules():
        found.append((id(module), type(module)))
        _fill(vars(module), found, seen)
    if optimizer is not None:
        _fill(vars(optimizer), found, seen)
    return [*found, plan, *switches()]


def switches() -> list[Any]:
    """Settings of the whole process."""
    hooks = vars(torch.nn.modules.module)
    return [
        gc.isenabled(),
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._len_torch_dispatch_stack(),
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
        torch._C._only_lift_cpu_tensors(),
        [v for v in vars(torch.utils._python_dispatch).values() if isinstance(v, bool)],
        torch._C._len_torch_function_stack(),
        torch.get_rng_state().tolist(),
        [id(one) for one in warnings.filters],
        logging.root.manager.disable,
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
        [list(one) for name, one in hooks.items() if name.startswith("_global_") and one],
    ]


def _fill(value: Any, found: list[Any], seen: dict[int, int]) -> None:
    if isinstance(value, (int, float, str, bytes, bool, type(None))):
        found.append(value)
        return
    found.append(id(value))
    if id(value) in seen or isinstance(value, (nn.Module, type)) or callable(value):
        return
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        found += [value.stride(), value.shape, value.dtype, value.requires_grad, _bytes(value)]
        found += [value.data_ptr() if value.layout == torch.strided else 0]
        _fill(value.grad if value.is_leaf else None, found, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            found.append(key if isinstance(key, str) else id(key))
            _fill(item, found, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _fill(item, found, seen)
    elif hasattr(value, "__dict__"):
        _fill(vars(value), found, seen)


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().tobytes()
