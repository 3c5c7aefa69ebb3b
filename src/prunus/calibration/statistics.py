"""One pass over calibration data: what criteria read of it, as sums and nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.calibration.activations import Site, Watch
from prunus.calibration.batches import Limited, count_samples, run_batch, samples_of
from prunus.calibration.confidence import Heads
from prunus.calibration.gradients import Contributions
from prunus.calibration.keeping import Keeper, describe_source, own_path
from prunus.calibration.readings import SecondMoments
from prunus.calibration.sharing import Processes, processes_of, share
from prunus.calibration.sums import Sums
from prunus.calibration.targets import Loss, loss_of
from prunus.errors import DataError, ModelError, PlanError, checks_options
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.tracer.adapters import adapted
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.trace import follow_modules, plain_kernels, quiet_run
from prunus.tracer.wrappers import unwraps

NEEDS = {
    "gradient": "weight × gradient over all that a unit owns, sample by sample",
    "head_gradient": "gradient of a gate on the unit, sample by sample",
    "activation": "what goes into the weights that read the unit",
    "attention": "the largest attention probability of every query",
    "second_moment": "mean and second moment of the columns that weights read",
}
"""What may be collected."""

_GRADIENTS = {"gradient", "head_gradient"}


@checks_options
@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over calibration data, in float64.

    Attributes
    ----------
    needs
        What was collected.
    unit_count
        Of the graph.
    samples
        Samples seen; where gradients were collected, each had a backward pass of its own.
    units
        By name, arrays of shape ``(unit_count + 1,)``, indexed by unit id, with
        ``T(s) = Σ w·∂L(s)/∂w`` over all weights that a unit owns and ``H(s)`` the gradient of a
        gate on it (:meth:`~prunus.calibration.gradients.Contributions.gated`) for sample s:
        ``"gradient"`` Σ T, ``"gradient_squared"`` Σ T², ``"fisher"`` ΣΣ (w·∂L/∂w)²,
        ``"head_gradient"`` Σ |H|.
    sites
        One for each place where weights read units (need ``"activation"``, and for what
        :attr:`~prunus.calibration.activations.Site.moments` holds ``"second_moment"``).
    heads
        One for each attention whose heads are units (need ``"attention"``).
    loss
        Mean loss of the samples; NaN without gradients.
    """

    needs: frozenset[str]
    unit_count: int
    samples: int
    units: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    sites: tuple[Site, ...] = field(default=(), repr=False)
    heads: tuple[Heads, ...] = field(default=(), repr=False)
    loss: float = float("nan")

    def merge(self, other: Statistics) -> Statistics:
        """Of the samples of both: what one pass over all of them gives, up to rounding.

        Both have to be collected with the same weights, graph, needs, plan and options, or with a
        graph of another trace of the same model.  A loss that draws wants a ``seed`` for each.

        Returns
        -------
        Statistics
            A new object; neither of the two is changed.

        Raises
        ------
        DataError
            If needs, units or sites are not the same.
        """
        both = self._sums().blank()
        both.add(self._sums())
        both.add(other._sums())
        return Statistics._of(both)

    def _sums(self) -> Sums:
        losses = 0.0 if math.isnan(self.loss) else self.loss * self.samples
        units = dict(self.units)
        return Sums(
            self.needs, self.unit_count, self.sites, self.heads, self.samples, losses, units
        )

    @staticmethod
    def _of(sums: Sums) -> Statistics:
        loss = sums.losses / sums.samples if sums.needs & _GRADIENTS else float("nan")
        return Statistics(
            sums.needs, sums.unit_count, sums.samples, sums.units, sums.sites, sums.heads, loss
        )


@checks_options
@unwraps
def collect(
    model: nn.Module,
    graph: CouplingGraph,
    data: Iterable[Any],
    needs: str | Iterable[str],
    *,
    loss: Loss | None = None,
    split: bool = True,
    seed: int = 0,
    plan: Plan | None = None,
    also: Collection[str] = (),
    positions: int = 64,
    memory_limit: int = 8 << 30,
    progress: Callable[[int], None] | None = None,
    path: str | os.PathLike[str] | None = None,
    accelerator: Processes | Literal["distributed"] | None = None,
) -> Statistics:
    """Run the model over calibration data once and keep sums of what criteria need.

    The model runs in eval mode; its weights, gradients, modes, attributes and the random state
    are as before when it returns.  Activations are dropped as they come, so memory beyond the
    forward (and for gradients the backward of one sample, and one set of gradients) hangs on
    the model alone.

    Parameters
    ----------
    model, graph
        The model, and what :func:`prunus.trace` found in it.
    data
        Batches: a tensor, or a tuple or list ``(inputs, labels, …)``, or a mapping of keyword
        arguments (with ``labels``, if there are any).  Labels are needed for nothing.
    needs
        Any of ``"gradient"``, ``"head_gradient"``, ``"activation"``, ``"attention"``,
        ``"second_moment"``.
    loss
        ``(output, batch) → scalar`` of one sample, for the gradients.  Without it, the loss is
        the model's own ``.loss`` or the cross-entropy of the labels, or without labels of its own
        answer; :func:`prunus.calibration.targets.loss_of` has it in full.  A language model gets
        its next-token loss from ``{"input_ids": ids, "labels": ids}``.
    split
        Whether dim 0 of a batch counts samples.  Gradients are then taken sample by sample, so
        that results don't hang on the batch size.  If false, a batch is one sample.
    seed
        For the loss that draws.
    plan
        Second moments of what reads units that this plan removes, and of nothing else.
    also
        Names of weights: second moments of what these read are taken whatever the plan says.
    positions
        Of an image at which second moments of what a convolution reads are taken, evenly spread.
    memory_limit
        Bytes that the second moments may take.  Where they would take more, the largest are taken
        for every tap of a convolution apart, and then of every column apart.
    progress
        Called with the number of batches done, after each batch that runs.
    path
        A file (safetensors) that keeps the sums while they grow: every half minute, and at the
        end.  If it is there, the batches that it counts are taken from ``data`` and not run, and
        the sums go on as if nothing had happened, which takes the same batches in the same order.
        A ``loss`` or ``forward_fn`` is known by its name.  Of several processes each has a file,
        ``NAME-1-of-4.safetensors``.
    accelerator
        An ``accelerate.Accelerator``, or anything with ``num_processes``, ``process_index`` and
        ``reduce(tensor, reduction="sum")``: the processes share the pass.  Each calls this with
        the plain model and its own part of the data, and each gets the statistics of all; a part
        may be empty.  ``"distributed"`` stands for the processes of ``torch.distributed``.
        Without it nothing is shared, whatever was initialised.
        A loss that draws, and which positions of an image are looked at, are others in every
        process: samples of process p are numbered from p · 2³².

    Raises
    ------
    DataError
        If the data is empty, or leads to what is not finite, or the output has no loss.
    FormatError
        If the file at ``path`` is of another model, graph, data or options, or damaged.
    FileError
        If it can't be read or written.
    ModelError
        If the weights are on the meta device, or on several.
    PlanError
        If the graph is another model's, or a need is unknown, or processes differ in what they
        collect.
    """
    wanted = _known(needs)
    tensors, _ = state_of(model)
    check_traced(graph, tensors)
    kept = None if plan is None else kept_units(graph, plan)
    moments = None
    if "second_moment" in wanted:
        moments = SecondMoments(kept, positions, memory_limit, frozenset(also))
    processes = processes_of(accelerator)
    index, count = processes.process_index, processes.num_processes
    passed = _Pass(model, graph, tensors, wanted, loss, seed, moments, index << 32)
    keeper: Keeper | None = None
    if path is not None:
        options: dict[str, Any] = {"loss": loss, "seed": seed, "split": split, "plan": kept}
        options |= {"positions": positions, "memory_limit": memory_limit, "also": sorted(also)}
        source = describe_source(graph, tensors, {**options, "process": f"{index + 1} of {count}"})
        keeper = Keeper(own_path(path, index, count), passed.sums, source, _place(model))
    with (
        entered_by(model, graph.forward_fn),
        quiet_run(model),
        adapted(model),
        traceable(model),
        follow_modules(model, passed.stack),
        _tracked(passed.weights),
    ):
        done = _go_through(batches := Limited(data), passed, keeper, progress, split=split)
    batches.warn(stacklevel=3)
    share(passed.sums, processes, _place(model))
    if not passed.sums.samples:
        raise DataError(
            "the calibration data is empty",
            why="its batches hold no sample"
            if done
            else "the iterable gave no batch (an iterator can be used only once)",
            fix="give a DataLoader or a list of batches",
        )
    return Statistics._of(passed.sums)


def _go_through(
    data: Iterable[Any],
    passed: _Pass,
    keeper: Keeper | None,
    progress: Callable[[int], None] | None,
    *,
    split: bool,
) -> int:
    """Add every batch that is not counted yet; how many there are."""
    singly = split and bool(passed.sums.needs & _GRADIENTS)
    done = 0
    for done, batch in enumerate(data, start=1):
        if keeper is not None and keeper.holds(batch):
            continue
        for part in samples_of(batch) if singly else [batch]:
            passed.take(part, 1 if singly or not split else count_samples(batch))
        if keeper is not None:
            keeper.step()
        if progress is not None:
            progress(done)
    if keeper is not None:
        keeper.finish()
    return done


def kept_units(graph: CouplingGraph, plan: Plan) -> Mask:
    """The units of a graph that a plan for its model keeps."""
    plan.check_model(graph.shapes)
    return graph.mask_from_positions({a: np.asarray(stay) for a, stay in plan.keep.items()})


def _known(needs: str | Iterable[str]) -> frozenset[str]:
    wanted = frozenset([needs] if isinstance(needs, str) else needs)
    unknown = sorted(wanted - set(NEEDS))
    if unknown or not wanted:
        raise PlanError(
            f"nothing called {unknown[0]!r} can be collected" if unknown else "nothing is needed",
            why=f"known are {', '.join(NEEDS)}",
            fix="name some of those",
        )
    return wanted


def check_traced(graph: CouplingGraph, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another model than the graph's, or without values, or here and there."""
    for name in graph.shapes:
        if name not in tensors or tuple(tensors[name].shape) != tuple(graph.shapes[name]):
            raise PlanError(
                "the graph is that of another model",
                why=f"{name} has shape {tuple(graph.shapes[name])} there, and here "
                f"{tuple(tensors[name].shape) if name in tensors else 'is missing'}",
                fix="trace this model",
            )
    places: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name in graph.parameters:
            places.setdefault(str(tensor.device), name)
    if "meta" in places:
        raise ModelError(
            f"{places['meta']} has a shape but no values",
            why="it is on the meta device, and statistics are taken from a model that runs",
            fix="load the weights first",
        )
    if len(places) > 1:
        told = ", ".join(f"{name} on {place}" for place, name in sorted(places.items()))
        raise ModelError(
            f"the model lies on {len(places)} devices",
            why=f"batches are moved to one device, and there are {told}",
            fix='move it to one: model.to("cpu"), say',
        )


def _place(model: nn.Module) -> torch.device:
    """Where second moments are summed up: with the model, unless float64 is missing there."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def traceable(model: nn.Module) -> AbstractContextManager[None]:
    """Kernels that show what they consist of, where a model has others: they cost time."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return plain_kernels() if recurrent else nullcontext()


@contextmanager
def _tracked(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """These weights take gradients, frozen ones too; as before afterwards."""
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])


class _Pass:
    """The run of one call of :func:`collect`, which adds to its sums."""

    def __init__(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        tensors: Mapping[str, Tensor],
        needs: frozenset[str],
        loss: Loss | None,
        seed: int,
        moments: SecondMoments | None,
        first: int,
    ) -> None:
        self.stack: list[str] = [""]
        self.weights: dict[str, Tensor] = {}
        self._model, self._graph, self._needs = model, graph, needs
        self._loss, self._seed, self._first = loss, seed, first
        self._contributions: Contributions | None = None
        if needs & _GRADIENTS:
            self._contributions = Contributions(graph)
            named = ((name, tensors[name]) for name in self._contributions.names)
            self.weights = {n: w for n, w in named if w.is_floating_point()}
        self._watch: Watch | None = None
        if needs - _GRADIENTS:
            self._watch = Watch(
                graph.program,
                tensors,
                self.stack,
                inputs="activation" in needs,
                attention="attention" in needs,
                moments=moments,
            )
        sites = tuple(self._watch.sites) if self._watch else ()
        confidence = self._watch.confidence if self._watch else None
        heads = tuple(confidence.heads) if confidence else ()
        self.sums = Sums(needs, graph.unit_count, sites, heads)

    @property
    def _number(self) -> int:
        """Of the present sample, the same however often the pass was stopped before it."""
        return self._first + self.sums.samples

    def take(self, batch: Any, samples: int) -> None:
        """Add what one batch brings: forward, and backward if gradients are needed."""
        if not samples:
            return
        if self._watch is not None:
            self._watch.begin(self._number)
        with torch.set_grad_enabled(self._contributions is not None):
            with self._watch or nullcontext():
                output = run_batch(self._model, batch)
            if self._contributions is None:
                self.sums.samples += samples
                return
            value = loss_of(
                output,
                batch,
                loss=self._loss,
                kept=self._graph.kept_outputs,
                seed=self._draw(),
            )
            found = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True)
        self._add(self._contributions, dict(zip(self.weights, found, strict=True)))
        self.sums.losses += float(value.detach())
        self.sums.samples += samples

    def _draw(self) -> int:
        """A seed of 32 bits (PyTorch's generator reads no more) for the present sample."""
        source = np.random.SeedSequence((self._seed, self._number))
        return int(source.generate_state(1)[0])

    def _add(self, of: Contributions, gradients: Mapping[str, Tensor | None]) -> None:
        plain, squared = of.reduce(self.weights, gradients)
        if not np.isfinite(squared).all():
            raise DataError(
                f"gradients of sample {self.sums.samples} are NaN or infinite",
                why="the sample holds such values, or the model makes them",
                fix="clean the data; for a model in half precision try float32",
            )
        if "gradient" in self._needs:
            owned = of.owned(plain)
            self._sum("gradient", owned)
            self._sum("gradient_squared", owned**2)
            self._sum("fisher", of.owned(squared))
        if "head_gradient" in self._needs:
            self._sum("head_gradient", np.abs(of.gated(plain)))

    def _sum(self, name: str, values: NDArray[np.float64]) -> None:
        self.sums.units[name] = self.sums.units.get(name, 0.0) + values
