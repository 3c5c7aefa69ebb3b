"""From a model and example inputs to a coupling graph and the program that ran."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.errors import PrunusError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import state_of
from prunus.graph.progress import shows
from prunus.tracer.adapters import adapted
from prunus.tracer.blocks import Children, find_blocks, follow_blocks
from prunus.tracer.build import build_graph
from prunus.tracer.caches import (
    Entries,
    find_caches,
    find_remembered,
    find_written,
    forget,
    has_tables,
    remember_attributes,
)
from prunus.tracer.capture import Recorder
from prunus.tracer.copies import Copy, deep_copy, stand_in
from prunus.tracer.dataflow import Dataflow
from prunus.tracer.fakes import unlogged
from prunus.tracer.follow import follow_loops, leave_modes, mark_attributes
from prunus.tracer.forward_fn import (
    ForwardFn,
    describe_entry,
    entered_by,
    entry_of,
    own_forward_seen,
)
from prunus.tracer.inputs import describe_inputs, find_rows, positional
from prunus.tracer.outputs import (
    Outputs,
    answer_of,
    find_left_in,
    find_outputs,
    select_outputs,
)
from prunus.tracer.outside import Outside, Watch
from prunus.tracer.precision import same_draws as same_draws
from prunus.tracer.provenance import listeners, marking
from prunus.tracer.quiet import follow_modules as follow_modules
from prunus.tracer.quiet import plain_kernels as plain_kernels
from prunus.tracer.quiet import quiet as quiet
from prunus.tracer.quiet import quiet_run as quiet_run
from prunus.tracer.quiet import same_modes, visits
from prunus.tracer.quiet import uncollected as uncollected
from prunus.tracer.renormalised import find_renormalised, keep_normed_weights, names_of
from prunus.tracer.settling import tie_unread
from prunus.tracer.units import find_moments
from prunus.tracer.wrappers import refuse_untraceable, scripted, unwraps, warn_untested


@checks_options
@shows("tracing")
@unwraps
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
    warn_untested()
    refuse_untraceable(model)
    args = positional(args)
    with uncollected():
        return _Task(model, args, dict(kwargs or {}), outputs, forward_fn).graph(real=real)


def forget_caches(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Remove what an earlier forward has left in the modules' dicts of tensors, in place."""
    forget(model, _Task(model, args, dict(kwargs), None, None).remembered)


@dataclass(frozen=True)
class _Task:
    """What is traced.  The forward runs on copies only, so that the model stays as it is."""

    model: nn.Module
    args: Any
    kwargs: dict[str, Any]
    outputs: str | Sequence[str] | None
    forward_fn: ForwardFn | None

    def graph(self, *, real: bool) -> CouplingGraph:
        """Of a run on fake tensors where that does, and else of one on real tensors."""
        found = None if real else self._on_fakes()
        return self._on_real() if found is None else found

    def _on_fakes(self) -> CouplingGraph | None:
        """None where the run on real tensors decides: on any error, and what only values tell."""
        run = _Run(self, real=False)
        with unlogged():
            graph = run.capture()
            if graph is None and self.on_meta:
                return _Run(self, real=False, apart=False).capture()
        return graph if self.on_meta or (run.clean and not run.hashed) else None

    def _on_real(self) -> CouplingGraph:
        """Integers that hash apart miss what the model finds in a dict that is keyed by a width.

        So where any was hashed, the answer of the traced run is compared with the model's own.
        """
        run = _Run(self, real=True)
        graph = run.capture()
        if graph is None or (run.hashed and not _agree(run.answer, self.answer())):
            graph = _Run(self, real=True, apart=False).capture()
        assert graph is not None  # a run whose integers hash as they compare raises what it meets
        return graph

    @cached_property
    def on_meta(self) -> bool:
        """Whether tensors have no values, so that nothing but fake ones can be run."""
        return any(tensor.device.type == "meta" for tensor in self.model.parameters())

    @cached_property
    def remembered(self) -> Entries:
        """Entries of the modules' dicts that an earlier forward has left there."""
        if self.on_meta or not has_tables(self.model):
            return {}
        copied = deep_copy(self.model)
        return find_remembered(copied.model, lambda _: self.answer(copied))[0]

    def answer(self, copied: Copy | None = None) -> dict[str, Tensor]:
        """What a copy of the model answers, untraced."""
        copied = deep_copy(self.model) if copied is None else copied
        args, kwargs = copied.of((self.args, self.kwargs))
        outside = Outside(list(copied.model.modules()))
        try:
            with quiet(), plain_kernels(), adapted(copied.model):
                copied.model.eval()
                with entered_by(copied.model, copied.of(self.forward_fn)):
                    return answer_of(copied.model(*args, **kwargs))
        finally:
            outside.restore()


def _agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two answers are alike but for rounding."""
    for name, one in a.items():
        other = b.get(name)
        if other is None or one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not torch.allclose(one.double(), other.double(), 1e-4, 1e-6, equal_nan=True):
            return False
    return True


class _Admitted:
    """The inputs as the recorder knows them, with the numbers of their values in order."""

    def __init__(self, recorder: Recorder) -> None:
        self.numbers: list[int] = []
        self._recorder = recorder
        self._known: dict[int, Tensor] = {}

    def admit(self, value: Any) -> Any:
        """A tensor as the forward will see it; one that is given twice is one to the forward."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = self._recorder.fake_input(value)
        self.numbers.append(self._recorder.value_of(self._known[id(value)]))
        return self._known[id(value)]


class _Ran(NamedTuple):
    """What a forward has left beside what the recorder holds.

    Attributes
    ----------
    inputs
        Numbers of the tensors that it was given.
    own_forward
        Whether the model's own forward ran, and not only a method in its place.
    """

    copied: Copy
    found: Outputs
    left_in: Sequence[tuple[str, Tensor]]
    inputs: Sequence[int]
    children: Children
    caches: list[str]
    written: list[str]
    own_forward: bool


class _Run:
    """One run of a copy of the model, and what is known of it afterwards.

    Attributes
    ----------
    hashed
        Whether an integer that is traced was hashed: as the key of a dict or of a cache.
    clean
        Whether nothing that the run made is left anywhere.
    answer
        The outputs, of a run on real tensors.
    """

    def __init__(self, task: _Task, *, real: bool, apart: bool = True) -> None:
        self._task = task
        self._real = real
        self._apart = apart
        self._watch = Watch()
        self._spaces: dict[int, dict[str, Any]] = {}
        self.hashed = False
        self.clean = False
        self.answer: dict[str, Tensor] = {}

    def capture(self) -> CouplingGraph | None:
        """The graph; None where the forward raised an error, and another run may do better."""
        failed = True
        try:
            graph = self._capture()
            failed = False
            return graph
        except PrunusError:
            raise
        except Exception as error:  # a forward may raise anything
            another = not self._real and not self._task.on_meta
            if not another and not (self.hashed and self._apart):
                raise
            traceback.clear_frames(error.__traceback__)
            failed = False
        finally:
            self.clean = self._watch.settle(self._spaces, failed=failed)
        return None

    def _capture(self) -> CouplingGraph:
        task, started = self._task, time.perf_counter()
        copied = (deep_copy if self._real else stand_in)(task.model)
        own = set(map(id, task.model.modules()))
        every = list(copied.model.modules())
        shared = [module for module in every if id(module) in own]
        modules = [module for module in every if id(module) not in own]
        for module in modules:
            self._watch.add(module)
        outside = Outside(every)
        self._spaces = outside.spaces
        outside.forget_tensors()
        state, aliases = state_of(task.model)
        theirs = {name: copied.of(tensor) for name, tensor in state.items()}
        recorder = Recorder(theirs, self._watch, real=self._real, apart=self._apart)
        recorder.sealed = scripted(task.model)
        recorder.holds = visits(copied.model) if self._real else {}
        try:
            run = self._forward(recorder, copied, shared)
            traced = time.perf_counter()
            graph = self._graph(recorder, run, state, aliases)
            seconds = {"trace": traced - started, "group": time.perf_counter() - traced}
            return replace(graph, seconds=seconds)
        finally:
            self.hashed = recorder.run.hashed
            recorder.release()
            outside.restore()
            for module in modules:
                vars(module).clear()  # which ends cycles

    def _forward(self, recorder: Recorder, copied: Copy, shared: Sequence[nn.Module]) -> _Ran:
        task, model = self._task, copied.model
        admitted = _Admitted(recorder)
        with (
            quiet(),
            plain_kernels(),
            adapted(model),
            same_modes(shared),
            entered_by(model, copied.of(task.forward_fn)),
            own_forward_seen(model) as forwards,
            follow_modules(model, recorder.stack),
            marking(recorder.run),
        ):
            model.eval()
            args, kwargs = tree_map(admitted.admit, copied.of((task.args, task.kwargs)))
            forget(model, task.remembered)
            recorder.sizes.attributes = mark_attributes(model)
            before = remember_attributes(model)
            loops = follow_loops(model, recorder.sizes.counted)
            follow = recorder.follow
            try:
                with follow_blocks(model, recorder) as children, loops, recorder, follow:
                    listeners[recorder.sizes] = None
                    found = find_outputs(recorder.sizes.returned(model(*args, **kwargs)))
            finally:  # an interrupt where a with statement ends leaves its mode behind
                listeners.pop(recorder.sizes, None)
                leave_modes(recorder, follow)
            left_in = find_left_in((args, kwargs)) if task.outputs is None else []
            caches, written = find_caches(before), find_written(before)
        return _Ran(
            copied, found, left_in, admitted.numbers, children, caches, written, bool(forwards)
        )

    def _graph(
        self,
        recorder: Recorder,
        ran: _Ran,
        state: Mapping[str, Tensor],
        aliases: Mapping[str, str],
    ) -> CouplingGraph:
        task = self._task
        chosen, released = self._pin_outputs(recorder, ran.found, ran.left_in)
        kept = {name: recorder.value_of(tensor) for name, tensor in chosen}
        left = set(ran.written) - set(recorder.state.values())  # by an earlier run, and not read
        state = {name: tensor for name, tensor in state.items() if name not in left}
        aliases = {name: first for name, first in aliases.items() if first in state}
        known = {name: ran.copied.of(tensor) for name, tensor in state.items()}
        unread = tie_unread(recorder, task.model, known, forward_ran=ran.own_forward)
        recorder.finish()
        recorded = recorder.program(ran.inputs, kept)
        flow = Dataflow(keep_normed_weights(recorded, recorder.from_state, task.model, state))
        graph, resolve = build_graph(recorder, flow, task.model, state, aliases)
        program = replace(flow.program, resolve=resolve)
        flow = flow.of(program)
        blocks, obstacles = find_blocks(ran.children, flow)
        rows = find_rows(recorder.nodes, ran.inputs, recorder.shapes, recorder.from_state)
        described = {
            "inputs": describe_inputs(task.args, task.kwargs, rows),
            "outputs": {name: list(tensor.shape) for name, tensor in chosen},
            "caches": ran.caches,
            "released": released,
            "unread": unread,
            "written": ran.written,
        }
        entry = entry_of(task.model) if task.forward_fn is None else task.forward_fn
        if entry is not None:
            described["forward_fn"] = describe_entry(entry)
        return replace(
            graph,
            program=program,
            renormalised=names_of(find_renormalised(flow), graph.groups),
            find_moments=partial(find_moments, program),
            forward_fn=entry,
            traced=described,
            blocks=blocks,
            obstacles=obstacles,
        )

    def _pin_outputs(
        self, recorder: Recorder, found: Outputs, left_in: Sequence[tuple[str, Tensor]]
    ) -> tuple[list[tuple[str, Tensor]], list[str]]:
        """The outputs that keep their shape, and the names of the others."""
        outputs = found.with_arrays(recorder.follow.arrays)
        for _, tensor in outputs.tensors:
            recorder.read(tensor)
        chosen, released = select_outputs(outputs, self._task.outputs)
        if self._real:
            self.answer = dict(outputs.tensors)
        for name, tensor in chosen:
            for label in recorder.labels[recorder.value_of(tensor)]:
                recorder.pin(label, f"output {name!r} keeps its shape")
        for _, tensor in left_in:
            for dim in range(tensor.dim()):
                label = recorder.label_of(tensor, dim)
                recorder.pin(label, "the forward leaves it in an input, where it keeps its shape")
        return chosen, released
