"""The public verbs that plan, prove and cut in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from prunus.calibration.batches import bounded, first_batches
from prunus.errors import PlanError, VerifyError, checks_options
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.importance import Statistics, collect, needs_of
from prunus.integrations.hf import example_inputs
from prunus.integrations.hf_config import uniform
from prunus.planner.culprits import tell_groups
from prunus.planner.depth_planning import (
    measure_influence,
    plan_depth,
    plan_left,
    refuse_statistics,
)
from prunus.planner.layers import find_drops, name_layers
from prunus.planner.option_values import Globs
from prunus.planner.options import PlanKeywords, PlanOptions, takes_options
from prunus.planner.width_planning import plan_of_mask
from prunus.recovery import (
    LOOKED_AT,
    Progress,
    Recover,
    Step,
    check_recovery,
    cut_and_recover,
)
from prunus.surgeon.apply import cut
from prunus.surgeon.depth import refuse_quantized, without_blocks
from prunus.surgeon.snapshot import all_or_nothing
from prunus.tracer.forward_fn import ForwardFn, entered_by
from prunus.tracer.inputs import positional
from prunus.tracer.randomness import DRAWS
from prunus.tracer.trace import trace
from prunus.verifier.bisect import find_culprits
from prunus.verifier.verify import Certificate, verify_traced

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mode = Literal["free", "uniform"]


@checks_options
@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` did: the smaller model, the plan, and the proof.

    ``held`` names the groups and blocks that stayed whole, with the reason: the proof rejected
    them, or in a uniform plan the config can't say them.  ``recovery`` has what was done with the
    calibration data, step by step, with the error of the outputs after each.
    """

    model: nn.Module
    graph: CouplingGraph
    plan: Plan
    certificate: Certificate | None
    held: Mapping[str, str] = field(default_factory=dict)
    recovery: tuple[Step, ...] = ()


@takes_options(PlanOptions)
@all_or_nothing
def shrink(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Globs | None = None,
    verified: bool = True,
    each_group: bool = True,
    mode: Mode = "free",
    forward_fn: ForwardFn | None = None,
    recover: Recover = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress | None = None,
    **options: Unpack[PlanKeywords],
) -> Shrunk:
    """Trace, plan, prove, cut and recover, all in one call; the model changes in place.

    Groups of which the proof finds that the model's own code does not follow are kept whole,
    and the plan is made again without them; so are blocks, unless they were named.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward.
    verified
        Prove first, on a copy, that the cut model computes the masked original.
    each_group
        Let the proof also remove every group alone, and list those whose removal moves nothing;
        for a model of many groups that takes most of the time.
    mode
        ``"uniform"``, for models of transformers: only what the plain ``config.json`` can say, the
        same counts in every layer, so that ``from_pretrained`` of the unmodified library loads
        what :func:`prunus.integrations.hf.save` writes.  ``Shrunk.held`` names what it can't say.
    forward_fn
        What is run in place of the forward, as in :func:`trace`, also on the data's batches.
    recover
        What is done after the proof, without labels and without training.
        ``"auto"`` folds what goes into what stays (:func:`compensate`, least squares), corrects
        the weights of LayerNorms and RMSNorms over axes that lost positions (no other method
        does), measures batch norms again (:func:`recalibrate`), and keeps of these what brings the
        outputs nearer to the dense model's; without data, it moves the statistics of batch norms
        by what random inputs say that the cut changed, and keeps them where that brings the
        outputs on these nearer.  ``"recalibrate"``, ``"bias"`` and ``"least_squares"`` do one
        thing alone, with data; ``"sequential"`` repairs layer after layer, each on what the
        repaired ones before it give (``compensate(sequential=True)``): better, and slower;
        ``"none"`` leaves what the cut left.  ``Shrunk.recovery`` says what each step brought.
    optimizer
        Its state is cut along, as by :func:`prunus.apply`.
    progress
        Called with the name of a step of the recovery, and the number of batches done.
    **options

    Raises
    ------
    VerifyError
        If the proof fails for every group, or for a block that was named; the model was not
        touched.
    BudgetError
        If the budget can't be met, or not without the groups that the proof rejects.
    DataError
        If the importance needs calibration data and there is none.
    """
    asked = PlanOptions(**options)
    asked.check()
    _check_mode(mode)
    check_recovery(recover, asked.data)
    args = positional(args)
    if asked.drops:
        refuse_quantized(model)
        refuse_statistics(asked.statistics)
    needs = frozenset() if asked.statistics is not None else needs_of(asked.importance)
    data = asked.data
    if data is not None and (needs or isinstance(asked.drop, int) or recover != "none"):
        data = bounded(data)
    asked = replace(asked, data=data)
    recovered_with = None if recover == "none" else data
    looked_at = [] if recovered_with is None else first_batches(recovered_with, LOOKED_AT)
    with entered_by(model, forward_fn):
        graph = trace(model, args, kwargs, outputs=outputs)
        task = _Task(graph, model, args, dict(kwargs or {}), asked, each_group, mode)
        chosen, certificate, held = task.solve(verified)
        chosen, steps = cut_and_recover(
            *(model, chosen, None if chosen.drops else graph, recovered_with),
            method=recover,
            looked_at=looked_at,
            new_biases=mode == "free",  # a plain config can't say them
            optimizer=optimizer,
            progress=progress,
            check=certificate is None or certificate.verdict != "exact",
            seed=asked.seed,
        )
    return Shrunk(model, graph, chosen, certificate, held, steps)


@checks_options
@all_or_nothing
def drop_layers(
    model: nn.Module,
    layers: Sequence[int],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    stack: str | None = None,
    outputs: Globs | None = None,
    verified: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Shrunk:
    """Drop whole layers, any residual blocks, in place: the skip connection is what is left.

    The result is verified against the model that skips them.  Caches are indexed anew, and the
    config says the new number of layers.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward; a model of transformers needs none.
    layers
        Places in the stack, from 0 on.
    stack
        The path of the list or sequence of modules that they stand in, or a glob that fits one;
        may be left out where a model has a single one.
    verified
        Prove it first, on a copy.
    optimizer
        The parameters of dropped layers leave it, as by :func:`prunus.apply`.

    Raises
    ------
    PlanError
        If there is no such stack or layer, a layer is named twice, all are, or one is no block that
        can be dropped; the message says why.
    ModelError
        If the model is quantized.
    VerifyError
        If the model without the layers does not compute what it does when they are skipped; the
        model was not touched.

    Examples
    --------
    >>> import torch
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)
    >>> small = drop_layers(model, [1, 2], torch.randn(1, 5, 8))
    >>> small.certificate.verdict, len(model.layers), small.plan.drops
    ('exact', 2, ('layers.1', 'layers.2'))
    """
    refuse_quantized(model)
    args, kwargs = inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs, outputs=outputs)
    names = name_layers(graph, model, layers, stack)
    task = _Task(graph, model, args, kwargs, PlanOptions(drop=names, seed=seed))
    chosen, certificate, held = task.solve(verified)
    cut(chosen, model, optimizer=optimizer)
    return Shrunk(model, graph, chosen, certificate, held)


@dataclass(frozen=True)
class _Left:
    """A model without some of its blocks: its graph, what has to stay whole, its statistics.

    ``traced`` is the graph as it was traced, ``graph`` the one to plan with.
    """

    graph: CouplingGraph
    traced: CouplingGraph
    held: Mapping[str, str]
    statistics: Statistics | None


@dataclass(frozen=True)
class _Task:
    """Plan, prove, find what the proof rejects, and plan again without it."""

    graph: CouplingGraph
    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any]
    asked: PlanOptions
    each_group: bool = True
    mode: Mode = "free"
    known: dict[tuple[str, ...], _Left] = field(default_factory=dict)

    def solve(self, verified: bool) -> tuple[Plan, Certificate | None, dict[str, str]]:
        """The plan, its certificate, and what was held with the reason."""
        held: dict[str, str] = {}
        asked = self.asked
        while True:
            names = find_drops(
                self.graph, asked.drop, lambda: self._influence, asked.protect_ends, held
            )
            blocks = {block.name for block in self.graph.blocks}
            left = self._without(names)
            held |= left.held
            hold = {n: f"it has to stay: {why}" for n, why in held.items() if n not in blocks}
            hold |= dict.fromkeys(asked.hold, "it is held")
            if left.statistics is not None:
                asked = replace(self.asked, statistics=left.statistics)
            with without_blocks(self.model, names):
                chosen = plan_left(self.graph, left.graph, self.model, names, asked, hold=hold)
            if not verified:
                return chosen, None, held
            certificate = self._prove(chosen, left.traced, each_group=self.each_group)
            if certificate.verdict != "inexact":
                return chosen, certificate, held
            found = self._reject_blocks(names)
            if found and not isinstance(asked.drop, int):
                name, why = next(iter(found.items()))
                raise VerifyError(
                    "without this block the model does not compute what it does when it is skipped",
                    where=name,
                    why=why,
                    fix="drop another block; the model was not touched",
                )
            touched = sum(bool(choice.removed) for choice in chosen.groups)
            if not found:
                found = self._reject_groups(chosen, left)
                if not found or len(found) == touched:
                    raise unproven(certificate, found)
            held |= found

    def _without(self, names: Sequence[str]) -> _Left:
        """What planning needs to know of the model without these blocks."""
        key = tuple(names)
        if key not in self.known:
            asked = self.asked
            graph, statistics = self.graph, asked.statistics
            held: dict[str, str] = {}
            with without_blocks(self.model, names):
                if names:
                    outputs = list(graph.kept_outputs)
                    graph = trace(self.model, self.args, self.kwargs, outputs=outputs)
                traced = graph
                if self.mode == "uniform":
                    given = self.kwargs and not self.args
                    inputs = self.kwargs if given else example_inputs(self.model)
                    graph, held = uniform(graph, self.model, inputs)
                needs = needs_of(asked.importance)
                if needs and asked.data is not None and statistics is None:
                    statistics = collect(
                        *(self.model, graph, asked.data, needs), loss=asked.loss, seed=asked.seed
                    )
            self.known[key] = _Left(graph, traced, held, statistics)
        return self.known[key]

    @cached_property
    def _influence(self) -> dict[str, float]:
        return measure_influence(self.model, self.graph, self.asked.data, self.args, self.kwargs)

    def _prove(self, chosen: Plan, graph: CouplingGraph | None, *, each_group: bool) -> Certificate:
        return verify_traced(
            chosen,
            self.model,
            self.args,
            self.kwargs,
            each_group=each_group,
            seed=self.asked.seed,
            graph=graph,
        )

    def _reject_blocks(self, names: Sequence[str]) -> dict[str, str]:
        """The blocks whose absence alone makes the proof fail, with the reason."""
        found: dict[str, str] = {}
        for name in names:
            chosen, _ = plan_depth(
                self.graph, self.model, [name], self.args, self.kwargs, PlanOptions()
            )
            proof = self._prove(chosen, None, each_group=False)
            if proof.verdict == "inexact":
                found[name] = _why_inexact(proof)
        return found

    def _reject_groups(self, chosen: Plan, left: _Left) -> dict[str, str]:
        """The groups of a plan that make its proof fail, with the reason."""
        graph = left.graph
        kept = graph.mask_from_positions({a: np.asarray(stay) for a, stay in chosen.keep.items()})

        def fails(mask: Mask) -> str:
            if mask.all():
                return ""
            try:
                with without_blocks(self.model, chosen.drops):
                    part = plan_of_mask(graph, self.model, mask, {"traced": graph.traced})
            except PlanError as error:
                return str(error)
            part = replace(part, drops=chosen.drops)
            proof = self._prove(part, left.traced, each_group=False)
            return _why_inexact(proof) if proof.verdict == "inexact" else ""

        return find_culprits(graph, kept, fails)


def unproven(proof: Certificate, groups: Mapping[str, str] | None = None) -> VerifyError:
    """The error for a plan that the proof rejects as a whole, or in each of these groups."""
    fix = "please report the case"
    if proof.reason.startswith(DRAWS):
        fix = "prune it with these numbers fixed (a probability of 0, the mean for a sample)"
    return VerifyError(
        "the cut model would not compute what the original does without the removed units",
        why="\n".join([_why_inexact(proof), *tell_groups(groups or {})]),
        fix=f"the model was not touched; {fix}",
    )


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        known = ", ".join(map(repr, get_args(Mode)))
        raise PlanError(f"mode={mode!r} is none of {known}", fix="leave it out for 'free'")


def inputs_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """The example inputs that were given; a model of transformers needs none."""
    args = positional(args)
    kwargs = dict(kwargs or {})
    return (args, kwargs) if args or kwargs else ((), example_inputs(model))


def _why_inexact(proof: Certificate) -> str:
    return proof.reason or f"the outputs differ by {proof.rel_err:.1e}"
