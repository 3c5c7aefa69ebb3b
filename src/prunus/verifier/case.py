"""A model, whole and cut by a plan, on inputs: what every check of the verifier reads.

Everything is made when it is first asked for, and once: a forward or a replay that two checks
read is run a single time.  One backward pass tells of most groups at once whether removing each
moves the outputs: every contraction over a unit reads it through a gate, and the gradient of the
outputs by the gates is, to first order, what removal does.  Only the groups of which that says too
little are removed, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus.errors import PrunusError, VerifyError
from prunus.graph.axis import Mask, kept_positions
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import Group
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon.apply import cut_own, kept_axes
from prunus.tracer.copies import duplicate
from prunus.tracer.dataflow import Dataflow
from prunus.tracer.outputs import answer_of
from prunus.tracer.renormalised import find_renormalised, names_of
from prunus.tracer.rerun import tied_nodes
from prunus.tracer.sources import find_line
from prunus.tracer.trace import quiet_run, trace
from prunus.verifier.permutation import (
    INTERCHANGEABLE,
    Drawn,
    Draws,
    exchange_error,
    relative_error,
)
from prunus.verifier.replay import Alter, Replay

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative error that still counts as exact."""


def tolerance(dtype: torch.dtype) -> float:
    """What counts as exact in a type; as in float32 where none is given for it."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


@dataclass(eq=False)
class Case:
    """A plan for a model, and inputs on which the two are compared.

    Attributes
    ----------
    plan
        The plan.
    original
        The model at full size; it lacks the blocks that the plan drops, and has the biases that
        it adds.  It is run, and not modified.
    source
        The model that the plan is for, blocks included; a copy of it is cut.
    args, kwargs
        What both are called with.
    outputs
        Names or globs of the outputs that are compared, as in :func:`prunus.trace`.
    traced
        A trace of ``original`` on these inputs, where there is one.
    on
        The inputs and the weights in words, for the certificate: ``"given inputs, own weights"``.
    seed
        Of the order that units take.
    gradients
        By unit, if they were taken.
    """

    plan: Plan
    original: nn.Module
    source: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Any = None
    traced: CouplingGraph | None = None
    on: str = ""
    seed: int = 0
    gradients: Tensor | None = field(default=None, init=False)
    _drawn: list[Drawn] = field(default_factory=list, init=False)
    _drawn_dense: list[Drawn] = field(default_factory=list, init=False)

    @cached_property
    def graph(self) -> CouplingGraph:
        """The trace of the model at full size."""
        if self.traced is not None:
            return self.traced
        with self.blaming_the_model():
            return trace(self.original, self.args, self.kwargs, outputs=self.outputs)

    @cached_property
    def kept(self) -> Mask:
        """The units that the plan keeps."""
        return self.graph.mask_from_positions(kept_axes(self.plan))

    @property
    def touched(self) -> list[Group]:
        """The groups that lose units."""
        return [group for group in self.graph.groups if not self.kept[group.units].all()]

    @cached_property
    def replay(self) -> Replay:
        """The traced program on these inputs."""
        return self.replay_of(self.graph)

    def replay_of(self, graph: CouplingGraph, state: dict[str, Tensor] | None = None) -> Replay:
        """The program of a graph on these inputs, with the model's tensors or others."""
        leaves = tree_leaves((self.args, self.kwargs))
        inputs = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        return Replay(graph, self.state[0] if state is None else state, inputs)

    @cached_property
    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the model at full size (:func:`prunus.graph.program.state_of`)."""
        return state_of(self.original)

    @cached_property
    def pruned_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The same of the pruned model."""
        return state_of(self.pruned)

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Outputs of the traced program with every unit kept."""
        return self.replay.run(self.graph.all_kept, self._drawn_dense)

    @cached_property
    def masked(self) -> dict[str, Tensor]:
        """Outputs of the masked original."""
        return self.replay.run(self.kept, self._drawn)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """Outputs of the model's own forward at full size."""
        with self.blaming_the_model():
            return self.run(self.original)

    @cached_property
    def exchanged(self) -> float:
        """How much the outputs change when the units of the touched groups take another order.

        Beside the traced program, where that shows it: then the program computes what the model
        does as well, and the model is not run a second time for that.
        """

        def error(before: Mapping[str, Tensor], limit: float) -> float:
            inputs = self.original, self.touched, self.args, self.kwargs
            with self.blaming_the_model():
                return exchange_error(self.graph, *inputs, self.seed, limit, before)

        if "whole" not in vars(self) and not tied_nodes(self.graph.program):
            beside = error(self.dense, float("inf"))
            if beside <= INTERCHANGEABLE:
                return beside
        return error(self.whole, INTERCHANGEABLE)

    @property
    def follows(self) -> bool:
        """Whether the traced program computes what the model does."""
        if self.exchanged <= INTERCHANGEABLE and "whole" not in vars(self):
            return True
        return relative_error(self.dense, self.whole) <= tolerance(self.dtype)

    @cached_property
    def pruned(self) -> nn.Module:
        """A copy that the surgeon has cut; its forward was not tried.

        It has memory of its own, so that a cut that writes in place is seen.
        """
        return cut_own(self.plan, duplicate(self.source))

    @cached_property
    def answer(self) -> dict[str, Tensor]:
        """Outputs of the pruned model's own forward."""
        return self.run(self.pruned)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the outputs are compared."""
        return next(iter(self.masked.values())).dtype

    def run(self, model: nn.Module, *, fast_path: bool = False) -> dict[str, Tensor]:
        """What a model answers to the inputs, in eval mode and without gradients.

        PyTorch's attention fast path is off, as in a trace, unless it is asked for.  Where the
        forward draws random numbers or rounds to a grid, the pruned model gets the kept positions
        of what came out in the masked original.
        """
        tied = self._tied(cut=model is not self.original)
        with quiet_run(model), _fast_path(fast_path), tied:
            return answer_of(model(*self.args, **self.kwargs))

    def _tied(self, *, cut: bool) -> AbstractContextManager[Any]:
        if not tied_nodes(self.graph.program):
            return nullcontext()
        if not cut:
            _ = self.dense
            return Draws(self.graph.program, self._drawn_dense, lambda label: np.arange(len(label)))
        _ = self.masked
        return Draws(
            self.graph.program, self._drawn, lambda label: kept_positions(label, self.kept)
        )

    def blaming_the_model(self) -> AbstractContextManager[None]:
        """What goes wrong within is no fault of the plan."""
        return blaming_the_model(self.on)


@contextmanager
def blaming_the_model(on: str) -> Iterator[None]:
    """What goes wrong within is no fault of a plan; ``on`` says which inputs the model gets.

    Raises
    ------
    VerifyError
        In place of whatever the model's own forward raises.
    """
    try:
        yield
    except PrunusError:
        raise
    except Exception as error:  # a forward may raise anything
        raise VerifyError(
            "the model itself does not run, before anything is removed",
            where=find_line(error),
            why=f"{type(error).__name__}: {error}",
            fix=f"give inputs that it takes: args= and kwargs=; this was on {on or 'these inputs'}",
        ) from error


@contextmanager
def _fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


MOVED = 1e-3
"""Removing a group has to move the output by this much, or the comparison verifies nothing."""

CLEAR = 5.0
"""A first-order effect of this many times MOVED is enough; below, the group is removed alone."""

FEW = 4
"""Up to so many groups are removed one by one, which takes no longer."""


def each_alone(case: Case) -> dict[str, float]:
    """By touched group: how far its removal alone moves the outputs, to first order if clear."""
    open_gates(case)
    moved = {group.name: _first_order(case, group) for group in case.touched}
    doubtful = [group for group in case.touched if not moved[group.name]]
    choices = [_removing(case, [group]) for group in doubtful]
    for index, outputs in case.replay.run_each(choices):
        moved[doubtful[index].name] = relative_error(case.dense, outputs)
    return moved


def pays(case: Case) -> bool:
    """Whether one gated run costs less than removing the touched groups one by one."""
    return len(case.touched) > FEW


def open_gates(case: Case) -> None:
    """Run the whole model through gates once, which also gives what it answers, where that pays."""
    if case.gradients is None and pays(case):
        case.gradients, outputs = gradients_of(case.replay)
        if outputs is not None:
            case.dense = outputs


def gradients_of(
    replay: Replay, alter: Alter | None = None
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """By unit, the gradient of the outputs by its gate, (units + 1,), and the outputs.

    Zeros and None where an operator has no derivative.
    """
    try:
        gates, outputs = replay.run_gated(alter)
        gradients = _gradients(gates, outputs)
    except (RuntimeError, NotImplementedError, PrunusError):
        return torch.zeros(replay.unit_count + 1), None
    return gradients, {name: tensor.detach() for name, tensor in outputs.items()}


def _first_order(case: Case, group: Group) -> float:
    """What the gradients say of the units that a group loses; 0 where that is not clear.

    The root of the sum of squares, which is not small by chance, as the change along one direction
    may be.  The sum is next to nothing where the units undo each other.
    """
    if case.gradients is None:
        return 0.0
    removed = case.gradients[torch.as_tensor(group.units[~case.kept[group.units]])]
    size = float(removed.norm())
    return size if size > CLEAR * MOVED and abs(float(removed.sum())) > MOVED / 4 else 0.0


def _gradients(gates: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Of a random projection of the outputs, (units + 1,).

    Divided by the root of the number of elements, and each output by its size: so the change of
    the projection exceeds the relative change of the outputs by chance only.
    """
    generator = torch.Generator().manual_seed(0)
    reached = [t for t in outputs.values() if t.requires_grad and t.numel()]
    if not reached:
        return torch.zeros(len(gates))
    directions = []
    for tensor in reached:
        finite = tensor.detach().isfinite()
        scale = tensor.detach().abs().where(finite, 0).max().clamp_min(1e-30)
        random = torch.randn(tensor.shape, generator=generator).to(tensor)
        size = (tensor.numel() * len(reached)) ** 0.5
        directions.append((random / (scale * size)).where(finite, 0))
    (gradient,) = torch.autograd.grad(reached, gates, directions)
    return gradient.nan_to_num()


MEASURED_ALONE = 6
"""Of more groups the distance is measured once, with all of them removed."""


def renormalised_groups(case: Case) -> dict[str, float]:
    """By touched group whose removal changes kept weights: the relative distance of the outputs.

    That is between the masked original, in which weights computed from weights are those of the
    kept entries, and plain silencing, in which they stay as they are.
    """
    found = find_renormalised(Dataflow(case.graph.program))
    if found is None:
        return {}
    named = names_of(found, case.graph.groups)
    touched = [group for group in case.touched if group.name in named]
    plain = case.replay_of(replace(case.graph, program=found.plain))
    sets = [touched] if len(touched) > MEASURED_ALONE else [[group] for group in touched]
    distances: dict[str, float] = {}
    for groups in sets:
        kept = _removing(case, groups)
        distance = relative_error(plain.run(kept), case.replay.run(kept))
        distances |= dict.fromkeys([group.name for group in groups], distance)
    return {name: by for name, by in distances.items() if by > tolerance(case.dtype)}


def _removing(case: Case, groups: Iterable[Group]) -> Mask:
    """What the plan keeps of these groups, and all of the others."""
    kept = case.graph.all_kept
    for group in groups:
        kept[group.units] = case.kept[group.units]
    return kept
