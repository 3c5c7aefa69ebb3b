"""Find the blocks that a model can do without: those around which a skip connection goes.

Every child of a ``ModuleList`` or ``Sequential`` leaves a note of when it ran, on what, and what
it returned.  Whether it is a residual block is then read off the recorded operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.graph.axis import Label
from prunus.graph.coupling import Block
from prunus.graph.program import Node, Ref, modules_in, tensors_of
from prunus.tracer.capture import Recorder
from prunus.tracer.dataflow import Dataflow, operand

_SUMS = {"aten::add", "aten::add_"}
"""What a skip connection ends in."""


@dataclass(slots=True)
class _Call:
    """One run of a child: the operators ``[first, last)``, and value numbers."""

    source: int | None
    first: int
    result: int | None = None
    last: int = 0


@dataclass(slots=True)
class _Child:
    container: str
    index: int
    siblings: int
    kind: type[nn.Module]
    calls: list[_Call] = field(default_factory=list)


Children = Mapping[str, _Child]


def main_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in nested containers; None without one.

    >>> main_tensor((torch.zeros(2, dtype=torch.int64), [torch.ones(3)]))
    tensor([1., 1., 1.])
    """
    if isinstance(value, Tensor):
        return value if value.dtype.is_floating_point else None
    found = (tensor for _, tensor in tensors_of(value) if tensor.dtype.is_floating_point)
    return next(found, None)


def main_input(args: Any, kwargs: Any) -> Tensor | None:
    """The first floating-point tensor that a module is called with."""
    found = main_tensor(args)
    return main_tensor(kwargs) if found is None else found


@contextmanager
def follow_blocks(model: nn.Module, recorder: Recorder) -> Iterator[Children]:
    """Let every child of a list or sequence note its runs, by its path."""
    children: dict[str, _Child] = {}
    handles: list[Any] = []

    def attach(module: nn.Module, child: _Child) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            source = recorder.number_of(main_input(args, kwargs))
            child.calls.append(_Call(source, len(recorder.nodes)))

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            child.calls[-1].result = recorder.number_of(main_tensor(output))
            child.calls[-1].last = len(recorder.nodes)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    try:
        for path, container in modules_in(model):
            if not isinstance(container, (nn.ModuleList, nn.Sequential)):
                continue
            siblings = len(container._modules)
            for index, (key, module) in enumerate(container._modules.items()):
                if not _is_simple(module):
                    name = f"{path}.{key}" if path else key
                    children[name] = _Child(path, index, siblings, type(module))
                    attach(module, children[name])
        yield children
    finally:
        for handle in handles:
            handle.remove()


def _is_simple(module: nn.Module | None) -> bool:
    """Whether it can't be a block: PyTorch's own layers, and what can't be hooked."""
    if module is None:
        return True
    own = type(module).__module__.startswith("torch.nn.modules") and not module._modules
    return own or isinstance(module, torch.jit.ScriptModule)


def find_blocks(children: Children, flow: Dataflow) -> tuple[tuple[Block, ...], dict[str, str]]:
    """The blocks that can be dropped, and for every other child why it can't be.

    A block can be dropped when it ran once, took and returned tensors of one shape that carry the
    same units, added what it computed to what it was given, and nothing outside of it reads
    anything else that it computed.  Parts of a residual block are no blocks of their own, unless
    they are of one kind and it can't be dropped itself or is nothing but a chain of them, a stage.
    """
    run = _Run(flow)
    mixed = _mixed(children)
    siblings: dict[str, list[_Child]] = {}
    for child in children.values():
        siblings.setdefault(child.container, []).append(child)
    blocks: list[Block] = []
    obstacles: dict[str, str] = {}
    whole: dict[str, bool] = {}  # residual blocks, and whether they can be left out
    for name, child in children.items():  # a part comes after the whole
        outer = _outer(name, whole, mixed=child.container in mixed)
        if outer:
            obstacles[name] = f"it is a part of the block {outer}"
            continue
        obstacle = run.why_no_block(child)
        if not obstacle and run.is_stage(name, child, siblings):
            obstacle = "it is a chain of blocks, which can be dropped one by one"
        elif not obstacle:
            obstacle = run.why_not_alone(child.calls[0])
            whole[name] = not obstacle
        if obstacle:
            obstacles[name] = obstacle
        else:
            dim = run.feature_dim(child.calls[0])
            blocks.append(Block(name, child.container, child.index, child.siblings, dim))
    return tuple(blocks), obstacles


def _outer(name: str, whole: Mapping[str, bool], *, mixed: bool) -> str:
    """The residual block that it is only a part of; empty if none."""
    return next((p for p in _parents(name) if p in whole and (whole[p] or mixed)), "")


def _mixed(children: Children) -> set[str]:
    """Paths of the containers whose children are of several kinds."""
    kinds = {(child.container, child.kind) for child in children.values()}
    return {path for path, count in Counter(path for path, _ in kinds).items() if count > 1}


class _Run:
    """What the runs of children show, in the dataflow of the model."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow, self._program = flow, flow.program
        self._nodes, self._shapes = flow.program.nodes, flow.program.shapes
        self._known: dict[int, str] = {}
        self._reads_state = [
            not flow.program.state.keys().isdisjoint(flow.reads[node]) for node in self._nodes
        ]
        self._outputs = set(flow.program.outputs.values())

    def why_no_block(self, child: _Child) -> str:
        """What tells it from a residual block; empty if it is one."""
        if id(child) not in self._known:
            self._known[id(child)] = self._why_no_block(child)
        return self._known[id(child)]

    def _why_no_block(self, child: _Child) -> str:
        if len(child.calls) != 1:
            count = len(child.calls)
            return f"it ran {count} times in one forward" if count else "it did not run"
        call = child.calls[0]
        if call.source is None or call.result is None:
            return "it takes or returns no floating-point tensor"
        shapes = self._shapes[call.source], self._shapes[call.result]
        if shapes[0] != shapes[1]:
            return f"it takes {list(shapes[0])} and returns {list(shapes[1])}"
        if not self._adds(call):
            return "no skip connection leads around what it computes"
        return ""

    def why_not_alone(self, call: _Call) -> str:
        """Why a residual block can't be left out all the same; empty if it can."""
        source, result = call.source, call.result
        assert source is not None
        assert result is not None
        if not self._carries_on(source, result):
            return "its output carries other units than its input"
        inside = self._nodes[call.first : call.last]
        made = {number for node in inside for number in node.outputs} - {result}
        if made & self._outputs or any(self._read_after(number, call.last) for number in made):
            return "code outside of it reads something else that it computes"
        outside = set(self._flow.readers.get(source, ())).difference(inside)
        if outside.intersection(self._flow.readers.get(result, ())):
            return "one operator reads both what it takes and what it returns"
        return ""

    def _carries_on(self, source: int, result: int) -> bool:
        label, labels = self._program.label, self._program.labels
        pairs = zip(labels[source], labels[result], strict=True)
        return all(_same_units(label(before), label(after)) for before, after in pairs)

    def _read_after(self, value: int, place: int) -> bool:
        readers = self._flow.readers.get(value)
        return readers is not None and self._flow.place[readers[-1]] >= place

    def is_stage(self, name: str, child: _Child, siblings: Mapping[str, list[_Child]]) -> bool:
        """Whether all its weights are in residual blocks of one kind, one after the other."""
        inner = (parts for at, parts in siblings.items() if f"{at}.".startswith(f"{name}."))
        return any(self._is_chain(child.calls[0], parts) for parts in inner)

    def _is_chain(self, whole: _Call, parts: Sequence[_Child]) -> bool:
        if len({part.kind for part in parts}) > 1 or any(map(self.why_no_block, parts)):
            return False
        inside = {i for part in parts for i in range(part.calls[0].first, part.calls[0].last)}
        around = set(range(whole.first, whole.last)) - inside
        return not any(self._reads_state[i] for i in around)

    def _adds(self, call: _Call) -> bool:
        """Whether the input comes through to the output, with something computed added on the way.

        A contraction over an operand ends what that operand carries.
        """
        touched, carried, summed = {call.source}, {call.source}, set[int]()
        for node in self._nodes[call.first : call.last]:
            read = set(self._flow.reads[node])
            if touched.isdisjoint(read):
                continue
            touched.update(node.outputs)
            through = (read & carried) - _contracted_by(node)
            if node.effect is None or not through:
                continue
            carried.update(node.outputs)
            is_sum = node.target._schema.name in _SUMS and len(read & touched) > 1
            if is_sum or through & summed:
                summed.update(node.outputs)
        return call.result in summed

    def feature_dim(self, call: _Call) -> int:
        """The dim over which the first contraction of the stream runs; the last one by default."""
        assert call.source is not None
        size = len(self._shapes[call.source])
        carried = {call.source}
        for node in self._nodes[call.first : call.last]:
            read = carried.intersection(self._flow.reads[node])
            for (name, *_), dim in node.effect.contracted if node.effect else ():
                factor = node.args[str(name)]
                if isinstance(factor, Ref) and factor.value in read:
                    own = len(self._shapes[factor.value])
                    return dim - size if own == size and dim < own - 1 else -1
            if read:
                carried.update(node.outputs)
        return -1


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _same_units(a: Label | None, b: Label | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)


def _contracted_by(node: Node) -> set[int]:
    places = node.effect.contracted if node.effect else ()
    operands = [operand(node, path) for path, _ in places]
    return {one.value for one in operands if isinstance(one, Ref)}
