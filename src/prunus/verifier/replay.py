"""The masked original: a traced program, run again at full size with units silenced.

It knows the model's tensors and the labels, and shares no code with the surgeon.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from prunus.errors import PrunusError, VerifyError
from prunus.graph.axis import Label, Mask, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.program import Node, Program, Ref, refs_in
from prunus.tracer.precision import same_draws
from prunus.tracer.registry import aliases, call_bound
from prunus.tracer.rerun import copy_of, draw, is_free, lay, run_on_kept, tied_nodes
from prunus.verifier.permutation import Drawn

Silence = Mask | Tensor | None
"""Which units are kept, or a gate for each unit, by which what reads it is multiplied; or none."""

Alter = Callable[[Node, dict[str, Any]], None]
"""Called with every operator that runs, and its arguments by name, which it may replace."""


class Replay:
    """Runs a traced program for real, at full size, with any set of units silenced."""

    def __init__(
        self, found: CouplingGraph, state: Mapping[str, Tensor], inputs: Iterable[Tensor]
    ) -> None:
        self.unit_count = found.unit_count
        self._program: Program = found.program
        self._state = state
        self._inputs = list(inputs)
        self._places: dict[int, list[tuple[str, int, Label]]] = {}
        self._last_use = _last_uses(self._program)
        self._order = {id(node): n for n, node in enumerate(tied_nodes(self._program))}
        self._written = _written_to(self._program)

    @property
    def writes(self) -> frozenset[str]:
        """Names of the model's tensors that its forward writes to."""
        state = self._program.state
        return frozenset(state[number] for number in self._written if number in state)

    def run(
        self, kept: Mask, drawn: list[Drawn] | None = None, alter: Alter | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, with the given units kept.

        Every random operator is noted in ``drawn``; every run draws the same
        (:mod:`prunus.tracer.rerun`).
        """
        with torch.no_grad():
            return self._run(None if kept.all() else kept, drawn, alter)

    def run_gated(self, alter: Alter | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """A gate of one for every unit, (units + 1,), and the outputs as functions of them.

        Each contraction over a unit multiplies what it reads by the unit's gate, so that the
        gradient says, to first order, what silencing the unit does to the outputs.
        """
        gates = torch.ones(self.unit_count + 1, requires_grad=True)
        with torch.enable_grad():
            return gates, self._run(gates, None, alter)

    def run_each(self, choices: Sequence[Mask]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The outputs with each choice of kept units, with its number, in another order.

        What comes before the first operator that reads a removed unit runs once for all of them.
        """
        read = [self._read_by(node) for node in self._program.nodes]
        firsts = [
            next((n for n, units in enumerate(read) if not kept[units].all()), len(read))
            for kept in choices
        ]
        done = 0
        with torch.no_grad(), same_draws():
            values = self._start()
            for first, index in sorted(zip(firsts, range(len(choices)), strict=True)):
                self._advance(values, range(done, first), None)
                done = first
                own = self._forked(values)
                self._advance(own, range(first, len(read)), choices[index])
                yield index, self._outputs(own)

    def _run(
        self, silence: Silence, drawn: list[Drawn] | None, alter: Alter | None = None
    ) -> dict[str, Tensor]:
        values = self._start()
        with same_draws():
            self._advance(values, range(len(self._program.nodes)), silence, drawn, alter)
        return self._outputs(values)

    def _start(self) -> dict[int, Any]:
        """What is known before the first operator."""
        program = self._program
        values: dict[int, Any] = {}
        values.update(zip(program.inputs, (t.clone() for t in self._inputs), strict=True))
        values.update({n: self._own(n, self._state[name]) for n, name in program.state.items()})
        values.update({n: self._own(n, tensor) for n, tensor in program.constants.items()})
        return values

    def _forked(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """The same values in memory of their own; what is a view of another stays one."""
        shared = {*self._program.state, *self._program.constants} - self._written
        memo: dict[int, Any] = {}
        return {n: v if n in shared else copy.deepcopy(v, memo) for n, v in values.items()}

    def _advance(
        self,
        values: dict[int, Any],
        indices: Iterable[int],
        silence: Silence,
        drawn: list[Drawn] | None = None,
        alter: Alter | None = None,
    ) -> None:
        """Run some of the operators."""
        for index in indices:
            node = self._program.nodes[index]
            with _blaming(node):
                bound = {name: _fetch(value, values) for name, value in node.args.items()}
                if alter is not None:
                    alter(node, bound)
                self._step(node, bound, values, silence, drawn)
            for number in self._last_use.get(index, ()):
                values.pop(number, None)

    def _outputs(self, values: Mapping[int, Any]) -> dict[str, Tensor]:
        return {name: values[number] for name, number in self._program.outputs.items()}

    def _read_by(self, node: Node) -> NDArray[np.int64]:
        """The units whose removal changes what an operator computes."""
        if node.effect is None:
            return np.empty(0, np.int64)
        labels = [label for _, _, label in self._contracted(node)]
        for (name, *_), dim in node.effect.mixing:
            label = self._program.value_label(node.args[str(name)], dim)
            labels += [] if label is None else [label]
        return np.concatenate([np.empty(0, np.int64), *(label.ravel() for label in labels)])

    def _own(self, number: int, tensor: Tensor) -> Tensor:
        """A tensor of the model, copied where the program writes to it."""
        return tensor.detach().clone() if number in self._written else tensor.detach()

    def _step(
        self,
        node: Node,
        bound: dict[str, Any],
        values: dict[int, Any],
        silence: Silence,
        drawn: list[Drawn] | None,
    ) -> None:
        noted = drawn is not None and id(node) in self._order
        before = copy_of(bound) if noted and not is_free(node.target) else []
        result = self._result(node, bound, silence)
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if drawn is not None and noted:
            drawn.append(Drawn(before, [tensor.clone() for tensor in tensors]))
        values.update(zip(node.outputs, self._laid(node, tensors), strict=True))

    def _laid(self, node: Node, tensors: list[Tensor]) -> list[Tensor]:
        """What an operator gave, in the memory layout that was recorded."""
        if len(tensors) != len(node.outputs):
            raise VerifyError(
                f"{node.target} gives {len(tensors)} tensors, and gave {len(node.outputs)} before",
                where=_place(node),
                why="the path of the forward depends on values, which change when units go",
                fix="nothing can be verified of such a forward, and the model was not touched; "
                "prune the parts before and after it",
            )
        if aliases(node.target):
            return tensors
        strides = self._program.strides
        return [
            lay(tensor, strides[number]) if tensor.layout == torch.strided else tensor
            for number, tensor in zip(node.outputs, tensors, strict=True)
        ]

    def _result(self, node: Node, bound: dict[str, Any], silence: Silence) -> Any:
        """What an operator returns, with what it reads of removed units silenced."""
        if isinstance(silence, np.ndarray):
            bound = self._silenced(node, bound, silence)
            result = run_on_kept(node, bound, self._program, silence)
            if result is not None:
                return result
        if id(node) in self._order:
            return draw(node.target, bound, self._order[id(node)])
        if isinstance(silence, Tensor):
            bound = self._gated(node, bound, silence)
        return _call_anyhow(node.target, bound)

    def _silenced(self, node: Node, bound: dict[str, Any], kept: Mask) -> dict[str, Any]:
        """What contractions read, zeroed where a unit is gone, in the memory layout it had."""
        for name, dim, label in self._contracted(node):
            gone = np.ones(len(label), dtype=np.bool_)
            gone[kept_positions(label, kept)] = False
            if gone.any():
                operand = bound[name]
                index = torch.as_tensor(np.flatnonzero(gone), device=operand.device)
                bound[name] = lay(operand.index_fill(dim, index, 0), operand.stride())
        return bound

    def _gated(self, node: Node, bound: dict[str, Any], gates: Tensor) -> dict[str, Any]:
        """What contractions read, as if multiplied by the gates."""
        for name, dim, label in self._contracted(node):
            if bound[name].is_floating_point():
                bound[name] = _Gate.apply(bound[name], gates, torch.as_tensor(label), dim)
        return bound

    def _contracted(self, node: Node) -> list[tuple[str, int, Label]]:
        """Operands that are summed over a labelled dim: name, dim, and label.

        Of several with one label only the first, data rather than weights: what is zero there adds
        nothing, whatever it is multiplied by.
        """
        if id(node) in self._places:
            return self._places[id(node)]
        places = (
            [(str(name), dim) for (name, *_), dim in node.effect.contracted] if node.effect else []
        )
        places.sort(key=lambda place: self._is_weight(node.args[place[0]]))
        found: list[tuple[str, int, Label]] = []
        for name, dim in places:
            label = self._program.value_label(node.args[name], dim)
            if label is not None and not any(np.array_equal(label, one[2]) for one in found):
                found.append((name, dim, label))
        self._places[id(node)] = found
        return found

    def _is_weight(self, reference: Any) -> bool:
        return isinstance(reference, Ref) and reference.value in self._weights

    @cached_property
    def _weights(self) -> set[int]:
        """Values that are computed from parameters, buffers and constants alone."""
        found = {*self._program.state, *self._program.constants}
        for node in self._program.nodes:
            references = refs_in(node.args)
            if references and all(reference.value in found for reference in references):
                found.update(node.outputs)
        return found


class _Gate(torch.autograd.Function):
    """A product with gates, which are one: nothing to compute but for the gradient by the gates."""

    @staticmethod
    def forward(ctx: Any, operand: Tensor, gates: Tensor, units: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(operand, units)
        ctx.dim, ctx.count = dim % operand.dim(), len(gates)
        return operand.view_as(operand)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        operand, units = ctx.saved_tensors
        others = [dim for dim in range(operand.dim()) if dim != ctx.dim]
        by_position = (operand * gradients[0]).sum(others) if others else operand * gradients[0]
        found = by_position.new_zeros(ctx.count, dtype=torch.float32)
        for column in units.to(operand.device).T:
            found.index_add_(0, column, by_position.float())
        return gradients[0], found.cpu(), None, None


@contextmanager
def _blaming(node: Node) -> Iterator[None]:
    """What goes wrong within is said of this operator."""
    try:
        yield
    except PrunusError:
        raise
    except Exception as error:  # a kernel may raise anything
        raise VerifyError(
            f"{node.target} does not run again as it was traced",
            where=_place(node),
            why=f"{type(error).__name__}: {error}",
            fix="the model was not touched; where sizes depend on values (as many boxes as are "
            "found), prune the part of the model before that, and else please report the case",
        ) from error


def _place(node: Node) -> str:
    return " ".join(filter(None, (node.module, node.source)))


def _call_anyhow(target: OpOverload, bound: dict[str, Any]) -> Any:
    """Run an operator; a view that the strides don't allow becomes a copy.

    Tensors have the strides that were recorded: PyTorch picks kernels by them (of a fused
    attention, say), and these trust that choice.
    """
    if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        return torch.ops.aten.reshape.default(bound["self"], bound["size"])
    return call_bound(target, bound)


def _written_to(program: Program) -> set[int]:
    """Values that an operator writes to, itself or a view of theirs."""
    base: dict[int, int] = {}
    written: set[int] = set()
    for node in program.nodes:
        for argument in node.target._schema.arguments:
            if argument.alias_info is None:
                continue
            for reference in refs_in([node.args.get(argument.name)]):
                root = base.get(reference.value, reference.value)
                base.update((number, root) for number in node.outputs)
                if argument.alias_info.is_write:
                    written.add(root)
    return written


def _last_uses(program: Program) -> dict[int, list[int]]:
    last: dict[int, int] = {}
    for index, node in enumerate(program.nodes):
        for reference in refs_in(node.args):
            last[reference.value] = index
    for number in program.outputs.values():
        last.pop(number, None)
    uses: dict[int, list[int]] = {}
    for number, index in last.items():
        uses.setdefault(index, []).append(number)
    return uses


def _fetch(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.value]
    if isinstance(value, (list, tuple)):
        return [_fetch(item, values) for item in value]
    return value
