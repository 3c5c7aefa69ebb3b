"""Runs of a model with the random numbers of another run: at the positions that correspond."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.errors import VerifyError
from prunus.graph.axis import Label
from prunus.graph.program import Node, Program, refs_in
from prunus.tracer.registry import bind
from prunus.tracer.rerun import copy_of, draw, is_free, is_tied, say_draws, tied_nodes

SAME = 1e-3
"""What goes into a random operator may differ by this much, relatively: depth amplifies rounding.
Where it differs more, the run keeps its own draws, and the outputs show it."""

Place = Callable[[Label], Any]
"""From the label of a dim to the positions of the given draws that a run takes along it."""


@dataclass(frozen=True)
class Drawn:
    """One random operator of a run: what went in, and what came out."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class Draws(TorchDispatchMode):
    """Runs a model with seeds of its own for each random operator, or with given draws.

    Parameters
    ----------
    program
        The trace of the model at full size.
    given, place
        The draws of a run at full size, and where this run finds its own among them.
    """

    def __init__(
        self, program: Program, given: Sequence[Drawn] = (), place: Place | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[Drawn] = []
        self._program, self._nodes = program, tied_nodes(program)
        self._given, self._place = given, place

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        bound = bind(func, args, kwargs)
        if not is_tied(func, bound):
            return func(*args, **kwargs)
        order = len(self.drawn)
        node = self._node_of(order, func, bound)
        inputs = [] if is_free(func) else copy_of(bound)
        out = draw(func, bound, order)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self._place is not None and order < len(self._given):
            self._take(node, self._given[order], inputs, outputs)
        self.drawn.append(Drawn(inputs, [tensor.clone() for tensor in outputs]))
        return out

    def _node_of(self, order: int, func: OpOverload, bound: Mapping[str, Any]) -> Node:
        """The random operator of the trace that this one is."""
        node = self._nodes[order] if order < len(self._nodes) else None
        if node is None or node.target is not func or "dropout_p" in bound:
            raise self._untied(f"{func} came in place of {node.target if node else 'nothing'}")
        return node

    def _take(self, node: Node, given: Drawn, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Overwrite the run's own draws by the given ones, where what went in is the same."""
        values = [ref.value for ref in refs_in(node.args)]
        wanted = [self._at(value, t) for value, t in zip(values, given.inputs, strict=False)]
        if not all(_same(one, other) for one, other in zip(inputs, wanted, strict=True)):
            return
        drawn = [self._at(v, t) for v, t in zip(node.outputs, given.outputs, strict=True)]
        for own, other in zip(outputs, drawn, strict=True):
            if own.shape != other.shape:
                raise self._untied(
                    f"{tuple(own.shape)} numbers are drawn, not {tuple(other.shape)}"
                )
            own.copy_(other)

    def _at(self, value: int, tensor: Tensor) -> Tensor:
        """The positions of a value that this run has."""
        for dim, atoms in enumerate(self._program.labels[value]):
            label = self._program.label(atoms)
            if label is not None and self._place is not None:
                index = torch.as_tensor(self._place(label), device=tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor

    def _untied(self, why: str) -> VerifyError:
        return VerifyError(
            say_draws(self._program) or "the forward rounds to a grid",
            why=f"the draws of two runs can't be tied: {why}",
            fix="let the forward draw none while it is pruned (a probability of 0, the mean in "
            "place of a sample)",
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    a, b = one.double(), other.double()
    return (
        bool(((a - b).abs() <= SAME * b.abs().max().clamp(min=1e-12)).all()) if a.numel() else True
    )
