"""One pass over calibration data: what criteria read of it, as sums and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from prunus.calibration.batches import (
    SAMPLES,
    Batches,
    as_traced,
    check_traced,
    count_samples,
    no_data,
    outputs_of,
    run_batch,
    samples_of,
)
from prunus.calibration.gradients import Contributions, Loss, loss_of
from prunus.calibration.moments import Moments, fit_memory
from prunus.calibration.ranks import are_several, device_of_group
from prunus.calibration.routed import Routed
from prunus.calibration.sites import Read, Site, Sites, Watch, find_sites, kept_units
from prunus.errors import DataError, PlanError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.graph.progress import Progress, counted, following
from prunus.tracer.attention import score_weights
from prunus.tracer.wrappers import unwraps

NEEDS = {
    "gradient": "weight × gradient over all that a unit owns, sample by sample",
    "head_gradient": "gradient of a gate on the unit, sample by sample",
    "activation": "what goes into the weights that read the unit",
    "second_moment": "mean and second moment of the columns that weights read",
    "routed": "norms of what experts add to the tokens that the router sends them",
}
"""What may be collected."""

_UNITS = {
    "gradient": ("gradient", "gradient_squared", "fisher"),
    "head_gradient": ("head_gradient",),
    "routed": ("routed", "routed_tokens"),
}
"""What is summed up per unit for a need."""

_GRADIENTS = frozenset({"gradient", "head_gradient"})
_READ = frozenset({"activation", "second_moment"})


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
        ``"head_gradient"`` Σ |H|, ``"routed"`` and ``"routed_tokens"`` the sums of
        :class:`~prunus.calibration.routed.Routed`.
    sites
        One for each place where weights read units (need ``"activation"``, and for what
        :attr:`~prunus.calibration.sites.Site.moments` holds ``"second_moment"``).
    loss
        Mean loss of the samples; NaN without gradients.
    outputs
        What the model answered to the first batches, by name, where that was wanted.
    """

    needs: frozenset[str]
    unit_count: int
    samples: int
    units: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    sites: tuple[Site, ...] = field(default=(), repr=False)
    loss: float = float("nan")
    outputs: tuple[Mapping[str, Tensor], ...] = field(default=(), repr=False)

    @property
    def moments(self) -> tuple[Moments, ...]:
        """Those of the sites, each once however many share it."""
        return tuple({id(s.moments): s.moments for s in self.sites if s.moments}.values())


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
    positions: int = 64,
    memory_limit: int = 8 << 30,
    samples: int = SAMPLES,
    progress: Progress | None = None,
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
        Any of ``"gradient"``, ``"head_gradient"``, ``"activation"``, ``"second_moment"``,
        ``"routed"``.
    loss
        ``(output, batch) → scalar`` of one sample, for the gradients.  Without it, the loss is
        the model's own ``.loss`` or the cross-entropy of the labels, or without labels of its own
        answer; :func:`prunus.calibration.gradients.loss_of` has it in full.  A language model gets
        its next-token loss from ``{"input_ids": ids, "labels": ids}``.
    split
        Whether dim 0 of a batch counts samples.  Gradients are then taken sample by sample, so
        that results don't hang on the batch size.  If false, a batch is one sample.
    seed
        For the loss that draws.
    plan
        Second moments of what reads units that this plan removes, and of what the queries and keys
        of attentions are made of, and of nothing else.
    positions
        Of an image at which second moments of what a convolution reads are taken, evenly spread.
    memory_limit
        Bytes that the second moments may take.  Where they would take more, the largest are taken
        for every tap of a convolution apart, and then of every column apart.
    samples
        How many samples are read: the first ones, in whole batches; ``found.samples`` says it.
    progress
        Called with the stage, the number of batches done, and how many there are (or None).

    Notes
    -----
    Where ``torch.distributed`` is initialised, every process calls this with its own part of the
    data, which may be empty, and gets the sums of all.

    Raises
    ------
    DataError
        If the data is empty, or leads to what is not finite, or the output has no loss.
    ModelError
        If the weights are on the meta device, or on several.
    PlanError
        If the graph is another model's, or a need is unknown.
    """
    wanted = Wanted(_known(needs), loss, split, seed, plan, positions, memory_limit)
    with following(progress):
        return gather(model, graph, Batches(data, samples), wanted)


@dataclass(frozen=True)
class Wanted:
    """What a pass is to collect; see :func:`collect`.

    The outputs of the first ``outputs`` batches are kept as well, where samples don't run alone.
    """

    needs: frozenset[str]
    loss: Loss | None = None
    split: bool = True
    seed: int = 0
    plan: Plan | None = None
    positions: int = 64
    memory_limit: int = 8 << 30
    outputs: int = 0

    @property
    def singly(self) -> bool:
        """Whether every sample runs alone."""
        return self.split and bool(self.needs & _GRADIENTS)


def gather(
    model: nn.Module, graph: CouplingGraph, data: Iterable[Any], wanted: Wanted
) -> Statistics:
    """What :func:`collect` does."""
    tensors, _ = state_of(model)
    check_traced(graph, tensors)
    also = score_weights(graph.program) if "second_moment" in wanted.needs else frozenset()
    sites = find_sites(graph, also)
    if "second_moment" in wanted.needs:
        _allot_moments(graph, sites, wanted, also)
    passed = _Pass(model, graph, tensors, sites, wanted)
    with as_traced(model, graph.forward_fn) as stack, _tracked(passed.weights):
        passed.watch(stack)
        ran = False
        for batch in counted(data, "collecting statistics"):
            ran = True
            for part in samples_of(batch) if wanted.singly else [batch]:
                passed.take(part, count_samples(part) if wanted.split else 1)
    found = _sum_over_processes(passed.found())
    if not found.samples:
        raise no_data(*["its batches hold no sample"] if ran else [])
    return found


def _sum_over_processes(own: Statistics) -> Statistics:
    """The sums of all processes of ``torch.distributed``, where it is initialised."""
    if not are_several():
        return own
    device = device_of_group()

    def reduce(values: Any) -> NDArray[np.float64]:
        whole = torch.as_tensor(values, dtype=torch.float64).to(device, copy=True)
        dist.all_reduce(whole)
        return np.asarray(whole.cpu().numpy())

    for site in own.sites:
        site.count = int(reduce(site.count))
        site.total, site.square = reduce(site.total), reduce(site.square)
        site.weights = _gathered(site.weights)
    for moments in own.moments:
        moments.reduce(lambda values: torch.from_numpy(reduce(values)).to(values.device))
    samples = int(reduce(own.samples))
    loss = float(reduce(own.loss * own.samples if own.samples else 0.0)) / max(samples, 1)
    units = {name: reduce(values) for name, values in own.units.items()}
    return replace(own, samples=samples, units=units, loss=loss if units else own.loss)


def _gathered(weights: dict[Any, Any]) -> dict[Any, Any]:
    """Those of all processes: weights are no data, and a part counts once."""
    parts: list[dict[Any, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, weights)
    return {part: sums for one in parts for part, sums in one.items()}


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


WIDEST = 8192
"""Columns above which products are summed up for every tap of a convolution apart."""


def _allot_moments(
    graph: CouplingGraph, sites: Sites, wanted: Wanted, also: Collection[str]
) -> None:
    """Give every site moments of which they are wanted: where a unit goes, or by name."""
    kept = None if wanted.plan is None else kept_units(graph, wanted.plan)
    shared: dict[int, tuple[Moments, int]] = {}
    for site in sites.all:
        wants = bool(site.label.any()) if kept is None else site.loses(kept)
        if site.dim is None or not (wants or site.tensor in also):
            continue
        columns = len(site.label) // site.window.groups * site.window.taps
        fresh = (Moments(site.window.groups, columns), site.window.taps)
        site.moments = shared.setdefault(site.source, fresh)[0]
    fit_memory(list(shared.values()), wanted.memory_limit, WIDEST)


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


def _zeros(needs: Collection[str], size: int) -> dict[str, NDArray[np.float64]]:
    """Sums per unit of what is needed."""
    return {name: np.zeros(size) for need in needs for name in _UNITS.get(need, ())}


class _Pass:
    """The run of one call of :func:`collect`, which adds to its sums."""

    def __init__(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        tensors: Mapping[str, Tensor],
        sites: Sites,
        wanted: Wanted,
    ) -> None:
        needs = self._needs = wanted.needs
        self._model, self._graph, self._tensors = model, graph, tensors
        self._sites, self._wanted = sites, wanted
        self._outputs: list[dict[str, Tensor]] = []
        self._contributions = Contributions(graph) if needs & _GRADIENTS else None
        named = self._contributions.names if self._contributions else ()
        self.weights = {n: tensors[n] for n in named if tensors[n].is_floating_point()}
        self._owners = {id(s.moments): s for s in reversed(sites.all) if s.moments}.values()
        self._watch: Watch | None = None
        self._units = _zeros(needs, graph.unit_count + 1)
        self._routed = Routed(graph, tensors) if "routed" in needs else None
        if self._routed is not None:
            routed = {"routed": self._routed.norms, "routed_tokens": self._routed.tokens}
            self._units.update(routed)
        self._samples, self._losses = 0, 0.0

    def watch(self, stack: list[str]) -> None:
        """From now on look at what is read, where that is wanted."""
        if self._needs & _READ:
            self._watch = Watch(self._sites, self._tensors, stack, self._hear)

    def _hear(self, site: Site, read: Read, part: tuple[int, int]) -> None:
        if site in self._owners:
            site.add_moments(read, self._samples, self._wanted.positions)
        if "activation" in self._needs:
            site.add(read, part)

    def found(self) -> Statistics:
        """What was added up until now."""
        graded = self._contributions is not None
        loss = self._losses / max(self._samples, 1) if graded else float("nan")
        sites = self._sites.all if self._needs & _READ else ()
        units = self._graph.unit_count
        described = (self._needs, units, self._samples, self._units, sites, loss)
        return Statistics(*described, tuple(self._outputs))

    def take(self, batch: Any, samples: int) -> None:
        """Add what one batch brings: forward, and backward if gradients are needed."""
        if not samples:
            return
        if self._watch is not None:
            self._watch.begin()
        with torch.set_grad_enabled(self._contributions is not None):
            with self._watch or nullcontext(), self._routed or nullcontext():
                output = run_batch(self._model, batch)
            if self._contributions is None:
                if len(self._outputs) < self._wanted.outputs:
                    self._outputs.append(outputs_of(output))
                self._samples += samples
                return
            value = loss_of(
                output,
                batch,
                loss=self._wanted.loss,
                kept=self._graph.kept_outputs,
                seed=self._draw(),
            )
            found = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True)
        self._add(self._contributions, dict(zip(self.weights, found, strict=True)))
        self._losses += float(value.detach())
        self._samples += samples

    def _draw(self) -> int:
        """A seed of 32 bits (PyTorch's generator reads no more) for the present sample."""
        source = np.random.SeedSequence((self._wanted.seed, self._samples))
        return int(source.generate_state(1)[0])

    def _add(self, of: Contributions, gradients: Mapping[str, Tensor | None]) -> None:
        plain, squared = of.reduce(self.weights, gradients)
        if not np.isfinite(squared).all():
            raise DataError(
                f"gradients of sample {self._samples} are NaN or infinite",
                why="the sample holds such values, or the model makes them",
                fix="clean the data; for a model in half precision try float32",
            )
        owned = of.owned(plain)
        found = {
            "gradient": owned,
            "gradient_squared": owned**2,
            "fisher": of.owned(squared),
            "head_gradient": np.abs(of.gated(plain)),
        }
        for name in found.keys() & self._units.keys():
            self._units[name] += found[name]
