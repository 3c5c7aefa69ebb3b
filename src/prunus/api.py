"""The public functions that plan, verify and prune in one call."""

# ruff: noqa: RUF009, ``option`` is a field specifier as ``dataclasses.field`` is

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from prunus.calibration.batches import Batches
from prunus.errors import PlanError, checks_options
from prunus.graph.amounts import Amount
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.groups import find_violation
from prunus.graph.plans import Plan
from prunus.graph.progress import Progress, following, shows
from prunus.importance import needs_of
from prunus.integrations.hf import example_inputs
from prunus.integrations.hf_config import Uniform
from prunus.planner.layers import name_layers
from prunus.planner.option_values import Globs, Scope, option, takes_options
from prunus.planner.options import PlanKeywords, PlanOptions, ScoreKeywords, ScoreOptions
from prunus.planner.planning import plan_verified, rejected
from prunus.planner.widths import plan_of_mask
from prunus.recovery import Recover, Step, check_recovery, cut_and_recover
from prunus.structures.by_hand import Where, with_units, without_heads
from prunus.surgeon.apply import cut, cut_along
from prunus.surgeon.ema import Average, check_scheduler
from prunus.surgeon.snapshot import all_or_nothing
from prunus.surgeon.tensors import refuse_quantized
from prunus.tracer.forward_fn import ForwardFn, entered_by
from prunus.tracer.inputs import positional
from prunus.tracer.trace import trace
from prunus.verifier.judgement import Certificate
from prunus.verifier.other_ways import follow_other_ways
from prunus.verifier.verify import verify

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mode = Literal["free", "uniform"]


@checks_options
@dataclass(frozen=True, repr=False)
class Shrunk:
    """What :func:`shrink` did: the smaller model, the plan, and the certificate.

    ``held`` names the groups and blocks that are kept whole, with the reason: verification rejected
    them, or in a uniform plan the config can't say them.  ``recovery`` has what was done with the
    calibration data, step by step, with the error of the outputs after each; ``samples`` is how
    many samples of the data were used.
    """

    model: nn.Module
    graph: CouplingGraph
    plan: Plan
    certificate: Certificate | None
    held: Mapping[str, str] = field(default_factory=dict)
    recovery: tuple[Step, ...] = ()
    samples: int = 0

    def __repr__(self) -> str:
        verdict = self.certificate or "not verified (verified=False)"
        return f"{self.plan}\n{verdict}"


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions(PlanOptions):
    """What :func:`shrink` can be asked: how to plan, and what follows the model beside it.

    Attributes
    ----------
    optimizer
        Its state is cut along, as by :func:`prunus.apply`.
    ema
        An average of the weights, which is cut by the same plan, as by :func:`prunus.apply`, and
        follows the repair: its parameters move by what that changed, its buffers are copied.
    scheduler
        Checked to drive ``optimizer``.
    """

    optimizer: torch.optim.Optimizer | None = option(None)
    ema: Any = option(None)
    scheduler: Any = option(None)


class ShrinkKeywords(PlanKeywords, total=False):
    """The names and types of :class:`ShrinkOptions`, for type checkers and editors."""

    optimizer: torch.optim.Optimizer | None
    ema: Any
    scheduler: Any


@takes_options(ShrinkOptions)
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
    progress: Progress | None = None,
    **options: Unpack[ShrinkKeywords],
) -> Shrunk:
    """Trace, plan, verify, prune and recover, all in one call; the model changes in place.

    Groups of which verification finds that the model's own code does not follow are kept whole,
    and the plan is made again without them; so are blocks, unless they were named.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward; a model of transformers needs none.
    verified
        Verify first, on a copy, that the pruned model computes what the masked original computes.
    each_group
        Also remove every group alone, and list those whose removal moves nothing;
        for a model of many groups that takes most of the time.
    mode
        ``"uniform"``, for models of transformers: only what the plain ``config.json`` can say, the
        same counts in every layer, so that ``from_pretrained`` of the unmodified library loads
        what :func:`prunus.integrations.hf.save` writes.  ``Shrunk.held`` names what it can't say.
    forward_fn
        What is run in place of the forward, as in :func:`trace`, also on the data's batches.
    recover
        What is done after verification, without labels and without training.
        ``"auto"`` absorbs removed units into the kept weights (:func:`compensate`), corrects
        the weights of LayerNorms and RMSNorms over axes that lost positions (no other method
        does), measures batch norms again (:func:`recalibrate`), and keeps of these what brings the
        outputs nearer to the dense model's; without data, it moves the statistics of batch norms
        by what random inputs say that the cut changed, and keeps them where that brings the
        outputs on these nearer.  ``"recalibrate"``, ``"bias"`` and ``"least_squares"`` do one
        thing alone, with data; ``"sequential"`` repairs layer after layer, each on what the
        repaired ones before it give (``compensate(method="sequential")``): better, and slower;
        ``"none"`` leaves what the cut left.  ``Shrunk.recovery`` says what each step brought.
    progress
        Called with each stage, how much of it is done, and of how much (or None).  Without it a
        call of more than two seconds shows a bar on stderr, if that is a terminal.
    **options

    Raises
    ------
    VerifyError
        If verification rejects every group, or a block that was named; the model was not
        touched.
    BudgetError
        If the budget can't be met, or not without the groups that verification rejects.
    DataError
        If the importance needs calibration data and there is none.
    """
    asked = ShrinkOptions(**options)
    asked.check()
    _check_mode(mode)
    check_recovery(recover, asked.data)
    args = positional(args)
    check_scheduler(asked.scheduler, asked.optimizer)
    average = Average(model, asked.ema, repaired=recover != "none")
    if not (args or kwargs) and hasattr(model, "main_input_name"):
        kwargs = example_inputs(model)
    if asked.drops:
        refuse_quantized(model)
    with following(progress), entered_by(model, forward_fn):
        data = _batches_to_read(asked, recover)
        asked = replace(asked, data=data)
        graph = trace(model, args, kwargs, outputs=outputs)
        library = None
        if mode == "uniform":
            library = Uniform(model, kwargs if kwargs and not args else example_inputs(model))
        planned = plan_verified(
            *(graph, model, args, dict(kwargs or {}), asked),
            verified=verified,
            each_group=each_group,
            restrict=None if library is None else library.restrict,
            repair=recover not in ("none", "recalibrate"),
        )
        certificate = planned.certificate
        accepted = planned.plan if library is None else library.accepted(planned.plan)
        chosen, steps = cut_and_recover(
            *(model, accepted, planned.graph, None if recover == "none" else data),
            statistics=planned.statistics,
            method=recover,
            new_biases=mode == "free",  # a plain config can't say them
            optimizer=asked.optimizer,
            check=certificate is None or certificate.verdict != "exact",
            seed=asked.seed,
        )
        cut_along(chosen, average)
        if library is not None:
            library.state(model)
    samples = 0 if data is None else data.samples
    return Shrunk(model, graph, chosen, certificate, planned.held, steps, samples)


@checks_options
@all_or_nothing
@shows("dropping layers")
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
    ema: Any = None,
    scheduler: Any = None,
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
        Verify it first, on a copy.
    optimizer, ema, scheduler
        As for :func:`prunus.apply`: dropped layers leave the optimizer and the average.

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
    check_scheduler(scheduler, optimizer)
    average = Average(model, ema)
    args, kwargs = _inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs, outputs=outputs)
    names = name_layers(graph, model, layers, stack)
    asked = PlanOptions(drop=names, seed=seed)
    found = plan_verified(graph, model, args, kwargs, asked, verified=verified)
    cut(found.plan, model, optimizer=optimizer)
    cut_along(found.plan, average)
    return Shrunk(model, graph, found.plan, found.certificate, found.held)


@takes_options(ScoreOptions)
@all_or_nothing
@shows("removing heads")
def prune_heads(
    model: nn.Module,
    heads: Amount | Mapping[Where, Amount | Collection[int]],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: Scope = "local",
    verified: bool = True,
    recover: Recover = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    scheduler: Any = None,
    **options: Unpack[ScoreKeywords],
) -> Shrunk:
    """Remove attention heads, by their numbers or as many as are said; the model changes in place.

    Parameters
    ----------
    model
        Any model whose attention is softmax(q kᵀ) v, fused or written out.
    heads
        How many are removed, as by ``shrink(remove={"heads": heads})``: ``0.3`` is a share of every
        layer, ``2`` a count, a mapping has amounts by layer.  Or layer → numbers of its query
        heads, as the model now counts them.  A layer is given by its number, or by its path or that
        of its attention where several stacks have numbers.
    args, kwargs
        Example inputs for the forward; a model of transformers needs none.
    scope
        As for :func:`shrink`: beside ``"local"``, a share is one of the heads of all layers.
    verified
        Verify first, on a copy, that the pruned model computes what the masked original computes.
    recover
        As for :func:`shrink`.
    optimizer, ema, scheduler
        As for :func:`shrink`.
    **options

    Raises
    ------
    PlanError
        If there is no such layer or head, if nothing would stay of a layer, or if heads can't go
        alone: query heads share keys and values with others of their KV group, and layers that
        share a position bias share their heads.  If heads are named, and an option chooses them.
    VerifyError
        If verification fails; the model was not touched.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> shrunk = prune_heads(model, {0: [1, 2]}, torch.randn(1, 3, 8))
    >>> shrunk.certificate.verdict, model.layers[0].self_attn.num_heads
    ('exact', 2)
    >>> shrunk = prune_heads(model, 1, torch.randn(1, 3, 8))
    >>> [layer.self_attn.num_heads for layer in model.layers]
    [1, 3]
    """
    asked = PlanOptions(scope=scope, remove={"heads": 1}, **options)
    numbers = _head_numbers(heads, asked)
    if numbers is None:
        return shrink(
            *(model, args, kwargs),
            verified=verified,
            recover=recover,
            optimizer=optimizer,
            ema=ema,
            scheduler=scheduler,
            remove={"heads": heads},  # type: ignore[dict-item]
            scope=scope,
            **options,
        )
    asked.check()
    check_recovery(recover, asked.data)
    refuse_quantized(model)
    check_scheduler(scheduler, optimizer)
    average = Average(model, ema, repaired=asked.data is not None)
    args, kwargs = _inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs)
    kept = without_heads(graph, numbers)
    data = None if asked.data is None else Batches(asked.data, asked.samples)
    return _cut(
        *(model, graph, kept, args, kwargs, verified, optimizer, average),
        seed=asked.seed,
        recover=recover,
        data=data,
    )


def _head_numbers(heads: Any, asked: PlanOptions) -> dict[Where, Collection[int]] | None:
    """Numbers of heads by layer; None where amounts are given.

    Raises
    ------
    PlanError
        If layers are given both, or numbers beside an option that chooses heads.
    """
    values = list(heads.values()) if isinstance(heads, Mapping) else [heads]
    by_number = [isinstance(v, Collection) and not isinstance(v, (str, bytes)) for v in values]
    if not any(by_number):
        return None
    if not all(by_number):
        raise PlanError(
            "some layers have numbers of heads, others amounts", fix="call prune_heads for each"
        )
    chooses = ("importance", "statistics", "loss", "include", "exclude", "scope")
    beside = [
        n for n in chooses if getattr(asked, n) != PlanOptions.__dataclass_fields__[n].default
    ]
    if beside:
        raise PlanError(
            f"{', '.join(beside)} can't be combined with heads by number",
            why="it chooses which heads are removed",
            fix="give an amount, as 0.3, or leave it out",
        )
    return dict(heads)


@checks_options
@all_or_nothing
@shows("removing units")
def keep(
    model: nn.Module,
    group: str,
    units: Collection[int],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verified: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    scheduler: Any = None,
    seed: int = 0,
) -> Shrunk:
    """Keep only the given units of a group; the model changes in place.

    Parameters
    ----------
    group
        Its name, as ``prunus inspect`` lists it.
    units
        Indices of the units that are kept, from 0.
    args, kwargs, verified, optimizer, ema, scheduler
        As for :func:`prune_heads`.

    Raises
    ------
    PlanError
        If there is no such group or unit, if none would stay, or if a constraint forbids it.
    VerifyError
        If verification fails; the model was not touched.
    """
    refuse_quantized(model)
    check_scheduler(scheduler, optimizer)
    average = Average(model, ema)
    args, kwargs = _inputs_of(model, args, kwargs)
    graph = trace(model, args, kwargs)
    kept = with_units(graph, group, units)
    return _cut(model, graph, kept, args, kwargs, verified, optimizer, average, seed)


def _cut(
    model: nn.Module,
    graph: CouplingGraph,
    kept: Mask,
    args: Any,
    kwargs: Any,
    verified: bool,
    optimizer: torch.optim.Optimizer | None,
    average: Average,
    seed: int,
    recover: Recover = "none",
    data: Batches | None = None,
) -> Shrunk:
    broken = find_violation(graph.constraints, kept)
    if broken:
        raise PlanError("these units can't be removed by themselves", why=broken)
    plan = plan_of_mask(graph, model, kept, {"chosen": "by hand", "traced": graph.traced})
    plan = follow_other_ways(plan, graph, model, kept)
    certificate = None
    if verified and plan.keep:
        certificate = verify(plan, model, args, kwargs, seed=seed, graph=graph)
        if certificate.verdict == "inexact":
            raise rejected(certificate)
    if data is None:
        cut(plan, model, optimizer=optimizer)
        cut_along(plan, average)
        return Shrunk(model, graph, plan, certificate)
    plan, steps = cut_and_recover(
        *(model, plan, graph, data), method=recover, optimizer=optimizer, seed=seed
    )
    cut_along(plan, average)
    return Shrunk(model, graph, plan, certificate, recovery=steps, samples=data.samples)


def _batches_to_read(asked: PlanOptions, recover: Recover) -> Batches | None:
    """The calibration batches, taken once; None where nothing reads them."""
    reads = asked.statistics is None and bool(needs_of(asked.importance))
    if asked.data is None or not (reads or asked.drops_least or recover != "none"):
        return None
    return Batches(asked.data, asked.samples)


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        known = ", ".join(map(repr, get_args(Mode)))
        raise PlanError(f"mode={mode!r} is none of {known}", fix="leave it out for 'free'")


def _inputs_of(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """The example inputs that were given; a model of transformers needs none."""
    args = positional(args)
    kwargs = dict(kwargs or {})
    return (args, kwargs) if args or kwargs else ((), example_inputs(model))
