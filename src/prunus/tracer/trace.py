"""From a model and example inputs to a coupling graph and the program that ran."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_map

from prunus.errors import TraceError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.tracer.adapters import adapted
from prunus.tracer.blocks import find_blocks, follow_blocks
from prunus.tracer.build import build_graph
from prunus.tracer.caches import clear_caches, find_caches, remember_attributes
from prunus.tracer.capture import Recorder
from prunus.tracer.entry import ForwardFn, describe_entry, entered_by, entry_of
from prunus.tracer.fakes import unlogged
from prunus.tracer.inputs import describe_inputs, find_rows
from prunus.tracer.loops import follow_loops
from prunus.tracer.moments import find_moments
from prunus.tracer.outputs import find_outputs, select_outputs
from prunus.tracer.program import Program, duplicate, state_of
from prunus.tracer.provenance import mark_attributes, marked_objects


@checks_options
def trace(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: str | Sequence[str] | None = None,
    forward_fn: ForwardFn | None = None,
    real: bool = False,
) -> CouplingGraph:
    """Run the forward once, in eval mode, and find out what hangs together.

    Parameters
    ----------
    model
        Any module, on any device; it is not modified.
    args, kwargs
        What the forward is called with; a bare tensor is taken as the only argument.  Costs in
        MACs are for these inputs.
    outputs
        Names or globs of the outputs that keep their shape, as ``"logits"``, ``"0"``, ``"p*"``;
        by default all of them except caches, and the hidden states, attentions and caches that
        transformers' output classes declare.
    forward_fn
        What is run in place of the forward: the name of a method of the model, or a function
        called as ``forward_fn(model, *args, **kwargs)``.  What is made of the graph runs it too.
    real
        Run on real tensors at once, instead of only where fake ones don't do.

    Raises
    ------
    TraceError
        If no output is named, or if no tensor comes out.  An error in the model's own forward is
        raised as it is.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    with uncollected(), entered_by(model, forward_fn):
        if not real:
            try:
                with unlogged():
                    return _capture(model, args, kwargs, outputs, real=False)
            except TraceError:
                raise
            except Exception:  # whatever a forward may raise on fake tensors: the real run decides
                if any(tensor.device.type == "meta" for tensor in model.parameters()):
                    raise
        return _capture(duplicate(model), args, kwargs, outputs, real=True)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from walking what is only growing: a third of the time of a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _capture(
    model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any, *, real: bool
) -> CouplingGraph:
    started = time.perf_counter()
    state, aliases = state_of(model)
    recorder = Recorder(state, real=real)
    numbers: list[int] = []
    admitted: dict[int, Tensor] = {}

    def admit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in admitted:  # a tensor that is given twice is one tensor to the forward
            admitted[id(value)] = recorder.fake_input(value)
        numbers.append(recorder.value_of(admitted[id(value)]))
        return admitted[id(value)]

    with quiet_run(model), plain_kernels(), adapted(model), follow_modules(model, recorder.stack):
        fake_args, fake_kwargs = tree_map(admit, (args, kwargs))
        clear_caches(model)
        recorder.sizes.attributes = mark_attributes(model)
        before = remember_attributes(model)
        loops = follow_loops(model, recorder.sizes.counted)
        with follow_blocks(model, recorder) as children, loops, recorder, recorder.follow:
            found = find_outputs(model(*fake_args, **fake_kwargs))
        caches = find_caches(model, before)
    traced = time.perf_counter()
    found = found.with_arrays(recorder.follow.arrays)
    for _, tensor in found.tensors:
        recorder.read(tensor)
    chosen, released = select_outputs(found, outputs)
    kept: dict[str, int] = {}
    for name, tensor in chosen:
        kept[name] = recorder.value_of(tensor)
        for label in recorder.labels[kept[name]]:
            recorder.pin(label, f"output {name!r} keeps its shape")
    graph, resolve = build_graph(recorder, model, state, aliases, tuple(kept))
    blocks, obstacles = find_blocks(children, recorder, resolve, kept)
    program = Program(
        tuple(recorder.nodes),
        tuple(numbers),
        recorder.state,
        recorder.constants,
        kept,
        tuple(recorder.labels),
        tuple(recorder.shapes),
        resolve,
        tuple(recorder.lifetimes.found),
    )
    described = {
        "inputs": describe_inputs(
            args,
            kwargs,
            find_rows(recorder.nodes, numbers, recorder.shapes, recorder.from_state),
        ),
        "outputs": {name: list(tensor.shape) for name, tensor in chosen},
        "caches": caches,
        "released": released,
    }
    entry = entry_of(model)
    if entry is not None:
        described["forward_fn"] = describe_entry(entry)
    seconds = {"trace": traced - started, "group": time.perf_counter() - traced}
    return replace(
        graph,
        program=program,
        find_moments=partial(find_moments, program),
        forward_fn=entry,
        traced=described,
        seconds=seconds,
        blocks=blocks,
        obstacles=obstacles,
    )


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fast path; everything touched is put back afterwards.

    The multi-head-attention fast path hides what it computes.  Modules that cache tensors
    during a forward get their attributes back.
    """
    modes = {module: module.training for module in model.modules()}
    snapshots = [_Snapshot(module) for module in modes]
    settings = [(values, dict(values)) for values in marked_objects(model)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with same_draws(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for snapshot in snapshots:
            snapshot.restore()
        for values, saved in settings:
            values.clear()
            values.update(saved)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def same_draws() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers go on afterwards where they stood before."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Without oneDNN and cuDNN, whose recurrent kernels say nothing of what they consist of."""
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


def _same(container: Any, content: Any) -> bool:
    """Whether a dict or set holds the very same entries; values are compared by identity."""
    if isinstance(container, dict):
        return list(map(id, container.values())) == list(map(id, content.values())) and list(
            container
        ) == list(content)
    return bool(container == content)


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
            if isinstance(container, list):
                container[:] = content
            elif not _same(container, content):
                container.clear()
                container.update(content)


@contextmanager
def follow_modules(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the module that is running on top of ``stack``."""
    paths = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
