"""Costs counted from outside, by PyTorch itself: a second opinion on the cost polynomials."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from prunus.errors import checks_options
from prunus.tracer.quiet import same_modes
from prunus.tracer.trace import plain_kernels, quiet_run


@checks_options
def measure_costs(
    model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Count a model's params, MACs and bytes without any label or polynomial.

    The forward really runs, once, in eval mode, under PyTorch's own FLOP counter (halved, with
    attention as plain matrix products).  Tied tensors count once; bytes are those of parameters
    and buffers.

    Parameters
    ----------
    model
        It is not modified.
    args, kwargs
        What the forward is called with; MACs are for these inputs, batch included.

    Examples
    --------
    >>> measure_costs(nn.Linear(8, 3), torch.zeros(2, 8))
    {'params': 27, 'macs': 48, 'bytes': 108}
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    counter = FlopCounterMode(display=False)
    with quiet_run(model), plain_kernels(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*args, **(kwargs or {}))
    state = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "bytes": sum(t.numel() * t.element_size() for t in state.values()),
    }


@checks_options
def measure_activation(
    model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> int:
    """Count the most bytes of tensors that are alive at one moment of a forward.

    The forward runs on fake tensors, in eval mode and without gradients; counted are its inputs
    and everything that it makes, parameters and buffers not.  Attention over heads is one kernel,
    whatever the head dims are.  Nothing of the tracer is used.

    Parameters
    ----------
    model
        It is not modified.  A forward that reads values of tensors can't run on fake ones.
    args, kwargs
        What the forward is called with.

    Examples
    --------
    >>> measure_activation(nn.Sequential(nn.Linear(8, 3), nn.ReLU()), torch.zeros(2, 8))
    112
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, Tensor] = {}

    def twin(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return twins.setdefault(id(value), fake.from_tensor(value))

    state = {n: twin(t) for n, t in chain(model.named_parameters(), model.named_buffers())}
    live = _Live(twins.values())
    fake_args, fake_kwargs = tree_map(twin, (args, dict(kwargs or {})))
    for tensor in tree_leaves((fake_args, fake_kwargs)):
        live.add(tensor)
    with quiet_run(model, copies=False), plain_kernels(), fake, live, _OneKernel():
        functional_call(model, state, fake_args, fake_kwargs)
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the memory of tensors as it comes and goes; that of known ones doesn't count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._seen = {_memory(tensor): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self.add(value)
        return out

    def add(self, value: Any) -> None:
        """Count a tensor's memory until it is freed."""
        if not isinstance(value, Tensor) or _memory(value) in self._seen:
            return
        storage = value.untyped_storage()
        self._seen[_memory(value)] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, _memory(value)).atexit = False

    def _free(self, memory: int) -> None:
        self._now -= self._seen.pop(memory)


class _OneKernel(TorchFunctionMode):
    """Attention over heads makes its output and nothing else.

    Which kernel PyTorch takes depends on the device and on whether values are as wide as queries.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            value = args[2] if len(args) > 2 else kwargs["value"]
            if query.dim() == 4:
                batch, heads, length, _ = query.shape
                # All fused kernels answer with the heads of a position side by side.
                return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@checks_options
def measure_latency(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warmup: int = 3,
    repeats: int = 15,
) -> float:
    """Milliseconds of a forward in eval mode: the median of ``repeats``, after a warm-up.

    Parameters
    ----------
    warmup, repeats
        Forwards that are not timed, and those that are.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    times = []
    with same_modes(model.modules()), torch.inference_mode():
        model.eval()
        for index in range(warmup + repeats):
            _finish(args)
            start = time.perf_counter()
            model(*args, **(kwargs or {}))
            _finish(args)
            if index >= warmup:
                times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _finish(args: tuple[Any, ...]) -> None:
    """Wait until the device has done what it was asked to."""
    if any(isinstance(value, Tensor) and value.is_cuda for value in args):
        torch.cuda.synchronize()
