"""The masked original: a traced program, run again at full size with units silenced.

It knows the model's tensors and the labels, and shares no code with the surgeon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from prunus.errors import VerifyError
from prunus.graph.axis import Mask, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.tracer.compress import run_on_kept
from prunus.tracer.program import Node, Program, Ref, refs_in
from prunus.tracer.randomness import copy_of, draw, random_nodes
from prunus.tracer.registry import call_bound


class Replay:
    """Runs a traced program for real, at full size, with any set of units silenced."""

    def __init__(
        self, found: CouplingGraph, state: Mapping[str, Tensor], inputs: Iterable[Tensor]
    ) -> None:
        self._program: Program = found.program
        self._state = state
        self._inputs = list(inputs)
        self._last_use = _last_uses(self._program)
        self._order = {id(node): n for n, node in enumerate(random_nodes(self._program))}

    def run(
        self, kept: Mask, watch: Callable[[Node, list[Tensor], Any], None] | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, with the given units kept.

        ``watch`` is called with every random operator, what went in, and what it drew; every run
        draws the same (:mod:`prunus.tracer.randomness`).
        """
        program = self._program
        values: dict[int, Any] = {}
        values.update(zip(program.inputs, (t.clone() for t in self._inputs), strict=True))
        values.update({n: self._state[name].detach().clone() for n, name in program.state.items()})
        values.update({n: tensor.clone() for n, tensor in program.constants.items()})
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for index, node in enumerate(program.nodes):
                self._step(node, values, kept, watch)
                for number in self._last_use.get(index, ()):
                    values.pop(number, None)
        return {name: values[number] for name, number in program.outputs.items()}

    def _step(self, node: Node, values: dict[int, Any], kept: Mask, watch: Any) -> None:
        bound = {name: _fetch(value, values) for name, value in node.args.items()}
        if id(node) in self._order:
            before = copy_of(bound)
            result = draw(node.target, bound, self._order[id(node)])
            if watch is not None:
                watch(node, before, result)
        else:
            result = run_on_kept(node, bound, self._program, kept)
        if result is None:
            result = _call_anyhow(node.target, self._silenced(node, bound, kept))
        tensors = [t for t in _leaves(result) if isinstance(t, Tensor)]
        if len(tensors) != len(node.outputs):
            raise VerifyError(
                f"{node.target} gives {len(tensors)} tensors, and gave {len(node.outputs)} before",
                where=" ".join(filter(None, (node.module, node.source))),
                why="the path of the forward depends on values, which change when units go",
                fix="nothing can be proven of such a forward, and the model was not touched; prune "
                "the parts before and after it",
            )
        values.update(zip(node.outputs, tensors, strict=True))

    def _silenced(self, node: Node, bound: dict[str, Any], kept: Mask) -> dict[str, Any]:
        """Every contracted operand, zeroed where a unit is gone."""
        for (name, *_), dim in node.effect.contracted if node.effect else ():
            label = self._program.value_label(node.args[str(name)], dim)
            if label is None:
                continue
            gone = np.setdiff1d(np.arange(len(label)), kept_positions(label, kept))
            if len(gone):
                operand = bound[str(name)]
                index = torch.as_tensor(gone, device=operand.device)
                bound[str(name)] = operand.index_fill(dim, index, 0)
        return bound


def _call_anyhow(target: OpOverload, bound: dict[str, Any]) -> Any:
    """Run an operator on tensors whose strides may be others than when it was recorded.

    PyTorch picks a fused attention by strides, and its kernels trust that choice: on others some
    compute nonsense.  A view that strides don't allow becomes a copy.
    """
    if "scaled_dot_product" in target._schema.name:
        bound |= {name: bound[name].contiguous() for name in ("query", "key", "value")}
    if target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default(bound["self"], bound["size"])
    return call_bound(target, bound)


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


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
