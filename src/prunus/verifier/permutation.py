"""Units of one group are interchangeable: swap them everywhere, and nothing may change.

A third instrument, which judges the labels themselves.  It needs neither mask nor replay nor
cut: the user's model answers twice, the second time with its units in another order.  It holds
under norms, softmax and means over channels.  Random numbers of a forward move along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunus.errors import VerifyError
from prunus.graph.axis import Label
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.program import Node, Program, refs_in, state_of
from prunus.tracer.copies import duplicate
from prunus.tracer.outputs import answer_of
from prunus.tracer.registry import bind
from prunus.tracer.rerun import copy_of, draw, is_free, is_tied, lay, say_draws, tied_nodes
from prunus.tracer.trace import quiet_run

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
        if "dropout_p" in bound:
            raise self._untied(f"{func} draws its dropout inside")
        if node is None or node.target is not func:
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


INTERCHANGEABLE = 1e-4
"""Largest relative change of the outputs when units of one group take another order."""

Places = NDArray[np.int64]
"""By unit: which unit takes its place."""


def exchange_error(
    graph: CouplingGraph,
    model: nn.Module,
    groups: Iterable[Group],
    args: Any,
    kwargs: Mapping[str, Any],
    seed: int,
    limit: float,
    before: Mapping[str, Tensor],
) -> float:
    """How much the kept outputs change when the units of the groups take another order.

    Units change places with units that stand on the same axes equally often.  Where an axis
    does not allow it (a group whose blocks differ), the group stays as it is.

    Parameters
    ----------
    limit
        A change above this is measured again in float64 where the model can run in it, since
        another order rounds differently and depth amplifies it.
    before
        What the model answers; it runs anew where it draws random numbers.
    """
    place = _permute(graph, groups, seed)
    single = relative_error(*_pair(graph, place, model, args, kwargs, before))
    if single <= limit:
        return single
    try:
        wide = to_double((tuple(args), dict(kwargs)))
        exact = _pair(graph, place, duplicate(model).double(), *wide)
        known = all(bool(tensor.isfinite().all()) for tensor in exact[0].values())
    except (RuntimeError, TypeError):
        known = False
    # Else the forward insists on its own type, or overflows in another.
    return relative_error(*exact) if known else single


def _pair(
    graph: CouplingGraph,
    place: Places,
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    before: Mapping[str, Tensor] | None = None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The kept outputs of a model, and the same with its units in another order.

    Random numbers move along; ``before`` are the outputs, where they are known.
    """

    def order(label: Label) -> Places:
        take = _take(label, place)
        return np.arange(len(label)) if take is None else take

    random = bool(tied_nodes(graph.program))
    draws = Draws(graph.program)
    if before is None or random:
        with quiet_run(model), draws if random else nullcontext():
            before = answer_of(model(*args, **kwargs))
    moved = Draws(graph.program, draws.drawn, order) if random else nullcontext()
    with _exchanged(graph, model, place), quiet_run(model), moved:
        after = answer_of(model(*args, **kwargs))
    return {name: before[name] for name in graph.kept_outputs}, after


def to_double(values: Any) -> Any:
    """The same containers, floating-point tensors in float64."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tree_map(cast, values)


@contextmanager
def _exchanged(graph: CouplingGraph, model: nn.Module, place: Places) -> Iterator[None]:
    """Within, every unit's positions stand on every axis where the unit goes."""
    tensors, _ = state_of(model)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for axis, label in graph.labels.items():
                take = _take(label, place)
                if take is not None and not np.array_equal(take, np.arange(len(take))):
                    tensor = tensors[axis.tensor]
                    before.append((tensor, tensor.data))
                    index = torch.as_tensor(take, device=tensor.device)
                    moved = tensor.detach().index_select(axis.dim, index)
                    tensor.data = lay(moved, tensor.stride())  # other memory, which nobody shares
        yield
    finally:
        for tensor, data in reversed(before):
            tensor.data = data


def _permute(graph: CouplingGraph, groups: Iterable[Group], seed: int) -> Places:
    random = np.random.default_rng(seed)
    place = np.arange(graph.unit_count + 1)
    for group in groups:
        labels = [graph.labels[axis] for axis, _ in group.axes]
        trial = place.copy()
        for members in _alike(group, labels):
            trial[members] = random.permutation(members)
        if all(_take(label, trial) is not None for label in labels):
            place = trial
    return place


def _alike(group: Group, labels: Iterable[Label]) -> list[Places]:
    """The group's units in classes that stand on the same axes equally often."""
    top = int(group.units[-1]) + 1
    owned = [label[label < top].ravel() for label in labels]
    counts = np.stack([np.bincount(units, minlength=top)[group.units] for units in owned])
    if (counts == counts[:, :1]).all():
        return [group.units]
    _, kind = np.unique(counts, axis=1, return_inverse=True)
    return [group.units[kind.ravel() == index] for index in range(int(kind.max()) + 1)]


def _take(label: Label, place: Places) -> Places | None:
    """Which old position every new one takes; None if the exchange does not fit the axis."""
    target = place[label]
    if label.shape[1] == 1:
        own, wanted = label[:, 0], target[:, 0]
        at = np.full(len(place), -1, dtype=np.int64)
        at[own] = np.arange(len(own))
        if np.array_equal(at[own], np.arange(len(own))):  # each unit stands there once: no sort
            found = at[wanted]
            return None if (found < 0).any() else found
    old, new = np.lexsort(label.T), np.lexsort(target.T)
    if not np.array_equal(label[old], target[new]):
        return None
    take = np.empty(len(label), dtype=np.int64)
    take[new] = old
    return take


def relative_error(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest ‖a − b‖∞ / ‖a‖∞ over the outputs; infinite where they can't be compared."""
    worst = 0.0
    for name, a in reference.items():
        b = other.get(name)
        if b is None or b.shape != a.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        a, b = _real(a), _real(b)
        gap, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not (np.isfinite(scale) and np.isfinite(gap)):
            same = a == b  # so are infinities of one sign: logits that a mask has ruled out
            gap = (a - b).abs().masked_fill(same, 0).max().item()
            scale = a.abs().masked_fill(same & a.isinf(), 0).max().item()
        if not (np.isfinite(scale) and np.isfinite(gap)):
            return float("inf")
        worst = max(worst, gap / scale if scale else float(gap > 0))
    return worst


def _real(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real if real.dtype in (torch.float32, torch.float64) else real.double()
