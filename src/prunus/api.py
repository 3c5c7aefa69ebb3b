"""The public verbs that need several rooms at once: plan and shrink."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.budget import Budget
from prunus.errors import DataError, PlanError, VerifyError
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.importance import Importance, Statistics, collect, name_of, needs_of, score
from prunus.importance.influence import block_influence
from prunus.importance.targets import Loss
from prunus.integrations.hf import example_inputs
from prunus.integrations.hf_config import uniform
from prunus.oracle import Certificate, verify
from prunus.planner import select, thin
from prunus.planner.allocate import Scope
from prunus.planner.layers import Drop, find_drops, name_layers
from prunus.plans import Plan
from prunus.recovery import recalibrate
from prunus.rollback import find_culprits
from prunus.surgeon.apply import cut
from prunus.surgeon.attributes import find_edits
from prunus.surgeon.depth import refuse_quantized, without_blocks
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.program import state_of
from prunus.tracer.trace import trace, uncollected

Globs = str | Sequence[str]


@uncollected()
def plan(
    graph: CouplingGraph,
    model: nn.Module,
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    loss: Loss | None = None,
    scope: Scope = "local",
    min_width: int = 1,
    max_ratio: float = 1.0,
    round_to: int = 1,
    include: Globs | None = None,
    exclude: Globs = (),
    hold: Collection[str] = (),
    drop: Drop = (),
    protect_ends: bool = True,
    seed: int = 0,
) -> Plan:
    """Choose what stays: so that every cost of a budget is met from below, or by a ratio.

    Where blocks are dropped, they go first, and what is left meets the rest of the budget.

    Parameters
    ----------
    graph, model
        What :func:`prunus.trace` found, and the model whose weights are scored.
    budget
        Upper bounds on ``params`` and ``macs``, as fractions of the dense cost or absolute.
    ratio
        In place of a budget: the share of units that every group loses, whatever that costs.
    importance
        A name: of the weights alone ``"l1"``, ``"l2"``, ``"lamp"``, ``"fpgm"``, ``"bn_scale"``;
        of calibration data ``"taylor"``, ``"fisher"``, ``"head_gradient"``, ``"activation"``,
        ``"wanda"``, ``"flap"``, ``"confidence"``; the control ``"random"``.  Or a
        :class:`prunus.Movement`, or a function of a group and a context.
    data, statistics
        Calibration batches for an importance that reads them, and for the influence of blocks
        (without them it is measured on random inputs of the traced shapes); or what
        :func:`prunus.collect` made of them for this graph, which may serve several plans.
    loss
        For gradients; see :func:`prunus.collect`.
    scope
        ``"local"`` (each group loses the same ratio), ``"isomorphic"`` (groups of one shape
        compete) or ``"global"`` (all groups compete: for scores that compare across layers).
    min_width, max_ratio
        Floors: units that every group keeps, and the largest ratio it may lose.
    round_to
        Every pruned width becomes a multiple of this.
    include, exclude
        Globs over group names and tensor names.
    hold
        Names of groups that stay whole (where blocks are dropped: names in what is left).
    drop
        Blocks to drop: their module paths, or how many, those of least influence
        (:func:`prunus.block_influence`).  Then neither budget nor ratio is needed.
    protect_ends
        Whether the first and last block of every stack stay when ``drop`` is a number.

    Raises
    ------
    BudgetError
        If the floors stop it; the message says which, and what is reachable.
    PlanError
        If blocks can't be dropped; the message says why.
    """
    options: dict[str, Any] = {
        "budget": budget,
        "ratio": ratio,
        "importance": importance,
        "loss": loss,
        "scope": scope,
        "min_width": min_width,
        "max_ratio": max_ratio,
        "round_to": round_to,
        "include": include,
        "exclude": exclude,
        "hold": hold,
        "seed": seed,
    }
    if not isinstance(drop, int) and not drop:
        return _plan_widths(graph, model, data=data, statistics=statistics, **options)
    refuse_quantized(model)
    if isinstance(data, Iterator):
        data = list(data)  # it is read twice
    args, kwargs = _traced_inputs(graph, model, seed)
    names = find_drops(
        graph, drop, lambda: _influence(model, graph, data, args, kwargs), protect_ends
    )
    return _plan_depth(graph, model, names, args, kwargs, data=data, **options)[0]


def _plan_depth(
    graph: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    **options: Any,
) -> tuple[Plan, CouplingGraph]:
    """A plan that drops blocks and cuts what is left, and the graph of what is left.

    Fractions of the budget are fractions of the model with all of its blocks.
    """
    with without_blocks(model, names):
        left = trace(model, args, kwargs, outputs=list(graph.kept_outputs)) if names else graph
        chosen = _plan_left(graph, left, model, names, budget=budget, ratio=ratio, **options)
    return chosen, left


def _plan_left(
    graph: CouplingGraph,
    left: CouplingGraph,
    model: nn.Module,
    names: Sequence[str],
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    **options: Any,
) -> Plan:
    """The plan of which ``left``, the graph of the model without its blocks, tells the widths."""
    if not names:
        return _plan_widths(left, model, budget=budget, ratio=ratio, **options)
    requested = None if budget is None else budget.requested
    if budget is not None:
        budget = Budget(**budget.limits(graph))
    if budget is None and ratio is None:
        chosen = plan_of_mask(left, model, left.all_kept, {"traced": left.traced})
    else:
        chosen = _plan_widths(left, model, budget=budget, ratio=ratio, **options)
    costs = {name: (graph.cost(name), after) for name, (_, after) in chosen.costs.items()}
    origin = {**chosen.origin, "budget": requested}
    return replace(chosen, drops=tuple(names), costs=costs, origin=origin)


def _traced_inputs(graph: CouplingGraph, model: nn.Module, seed: int) -> Any:
    spec = graph.traced.get("inputs")
    if spec is None:
        raise PlanError(
            "there are no inputs to trace the model with once its blocks are dropped",
            why="those of its trace can't be described as plain data",
            fix="use prunus.shrink(model, args, drop=...), which has them",
        )
    return rebuild_inputs(spec, model, seed=seed)


def _influence(
    model: nn.Module, graph: CouplingGraph, data: Iterable[Any] | None, args: Any, kwargs: Any
) -> dict[str, float]:
    if data is not None:
        return block_influence(model, graph, data)
    return block_influence(model, graph, [()], forward_fn=lambda m, _: m(*args, **kwargs))


def _plan_widths(
    graph: CouplingGraph,
    model: nn.Module,
    *,
    budget: Budget | None = None,
    ratio: float | None = None,
    importance: str | Importance = "l2",
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    loss: Loss | None = None,
    hold: Collection[str] = (),
    seed: int = 0,
    **options: Any,
) -> Plan:
    if statistics is None and data is not None and needs_of(importance):
        statistics = collect(model, graph, data, needs_of(importance), loss=loss, seed=seed)
    options = {**_OPTIONS, **options}
    with uncollected():
        tensors, _ = state_of(model)
        scores = score(graph, tensors, importance, seed=seed, statistics=statistics)
        for name in hold:
            scores[graph.group(name).units] = np.inf
        kept = _choose(graph, scores, budget, ratio, **options)
        said = ("scope", "min_width", "max_ratio", "round_to")
        origin = {
            "importance": name_of(importance),
            "budget": None if budget is None else budget.requested,
            "ratio": ratio,
            **{name: options[name] for name in said},
            "hold": sorted(hold),
            "seed": seed,
            "traced": graph.traced,
        }
        return plan_of_mask(graph, model, kept, origin)


_OPTIONS: Mapping[str, Any] = {
    "scope": "local",
    "min_width": 1,
    "max_ratio": 1.0,
    "round_to": 1,
    "include": None,
    "exclude": (),
}


def plan_of_mask(
    graph: CouplingGraph, model: nn.Module, kept: Mask, origin: Mapping[str, Any]
) -> Plan:
    """The plan that keeps a mask's units, with the attributes that follow."""
    chosen = Plan.from_mask(graph, kept, origin=origin)
    return replace(chosen, edits=find_edits(model, graph, kept))


def _choose(
    graph: CouplingGraph,
    scores: NDArray[np.float64],
    budget: Budget | None,
    ratio: float | None,
    **options: Any,
) -> Mask:
    if budget is not None and ratio is None:
        return select(graph, scores, budget, **options)
    if ratio is not None and budget is None:
        _refuse_options(options)
        return thin(graph, scores, ratio)
    raise PlanError(
        "a budget and a ratio were given"
        if ratio is not None
        else "nothing says how much to remove",
        why="exactly one of the two says how much to remove",
        fix="give budget=Budget(macs=0.5), say, or ratio=0.3",
    )


def _refuse_options(options: Mapping[str, Any]) -> None:
    """A ratio is a ratio of every group: what shapes a budget's choice has no say in it."""
    neutral = {"min_width": 1, "max_ratio": 1.0, "round_to": 1, "include": None, "exclude": ()}
    given = [name for name, value in neutral.items() if options[name] != value]
    if given:
        raise PlanError(
            f"{', '.join(given)} can't be combined with ratio=",
            why="a ratio is taken from every group alike",
            fix="give a budget instead",
        )


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` did: the smaller model, the plan, and the proof.

    ``held`` names the groups that the proof rejected and that therefore stayed whole, with the
    reason.
    """

    model: nn.Module
    graph: CouplingGraph
    plan: Plan
    certificate: Certificate | None
    held: Mapping[str, str] = field(default_factory=dict)


def shrink(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget: Budget | None = None,
    data: Iterable[Any] | None = None,
    outputs: Globs | None = None,
    verified: bool = True,
    each_group: bool = True,
    mode: Literal["free", "uniform"] = "free",
    drop: Drop = (),
    protect_ends: bool = True,
    seed: int = 0,
    **options: Any,
) -> Shrunk:
    """Trace, plan, prove, cut and recalibrate, all in one call; the model changes in place.

    Groups of which the proof finds that the model's own code does not follow are kept whole,
    and the plan is made again without them; so are blocks, unless they were named.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward.
    budget
        See :func:`plan`, which also takes the ``options``.
    data
        Calibration batches, for batch norms (without them they keep the old statistics), for an
        importance that reads them, and for the number of blocks to drop (without them that is
        decided on the example inputs).  An iterator that has to serve twice is kept as a list.
    verified
        Prove first, on a copy, that the cut model computes the masked original.
    each_group
        Let the proof also remove every group alone, and list those whose removal moves nothing;
        for a model of many groups that takes most of the time.
    mode
        ``"uniform"``, for models of transformers: only what the plain ``config.json`` can say, the
        same counts in every layer, so that ``from_pretrained`` of the unmodified library loads
        what :func:`prunus.integrations.hf.save` writes.  ``Shrunk.held`` names what it can't say.
    drop, protect_ends
        Blocks to drop, as in :func:`plan`: with them the budget may be left out.

    Raises
    ------
    VerifyError
        If the proof fails for every group, or for a block that was named; the model was not
        touched.
    BudgetError
        If the budget can't be met, or not without the groups that the proof rejects.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    if isinstance(drop, int) or drop:
        refuse_quantized(model)
    needs = needs_of(options.get("importance", "l2"))
    if isinstance(data, Iterator) and (needs or isinstance(drop, int)):
        data = list(data)  # it is read twice
    batches = data if data is None or needs else _at_least_one(data)
    graph = trace(model, args, kwargs, outputs=outputs)
    task = _Task(
        graph, model, args, dict(kwargs or {}), drop, protect_ends, data, each_group, seed, mode
    )
    asked = tuple(options.pop("hold", ()))
    chosen, certificate, held = task.solve(asked, verified, {"budget": budget, **options})
    undo = cut(chosen, model)
    if batches is not None:
        try:
            recalibrate(model, batches)
        except BaseException:
            undo()
            raise
    return Shrunk(model, graph, chosen, certificate, held)


def drop_layers(
    model: nn.Module,
    layers: Sequence[int],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    stack: str | None = None,
    outputs: Globs | None = None,
    verified: bool = True,
    seed: int = 0,
) -> Shrunk:
    """Drop whole layers, any residual blocks, in place: the skip connection is what is left.

    The result is verified against the model that skips them.  Caches are indexed anew, and the
    config says the new number of layers.

    Parameters
    ----------
    model, args, kwargs
        The model and example inputs for its forward.
    layers
        Places in the stack, from 0 on.
    stack
        The path of the list or sequence of modules that they stand in, or a glob that fits one;
        may be left out where a model has a single one.
    verified
        Prove it first, on a copy.

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
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    graph = trace(model, args, kwargs, outputs=outputs)
    names = name_layers(graph, model, layers, stack)
    task = _Task(graph, model, args, dict(kwargs or {}), names, True, None, True, seed)
    chosen, certificate, held = task.solve((), verified, {})
    cut(chosen, model)
    return Shrunk(model, graph, chosen, certificate, held)


@dataclass(frozen=True)
class _Left:
    """A model without some of its blocks: its graph, what has to stay whole, its statistics."""

    graph: CouplingGraph
    held: Mapping[str, str]
    statistics: Statistics | None


@dataclass(frozen=True)
class _Task:
    """Plan, prove, find what the proof rejects, and plan again without it."""

    graph: CouplingGraph
    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any]
    drop: Drop
    protect_ends: bool
    data: Iterable[Any] | None
    each_group: bool
    seed: int
    mode: Literal["free", "uniform"] = "free"
    known: dict[tuple[str, ...], _Left] = field(default_factory=dict)

    def solve(
        self, asked: Sequence[str], verified: bool, options: Mapping[str, Any]
    ) -> tuple[Plan, Certificate | None, dict[str, str]]:
        """The plan, its proof, and what was held with the reason."""
        held: dict[str, str] = {}
        options = dict(options)
        given = options.pop("statistics", None)
        while True:
            names = find_drops(
                self.graph, self.drop, lambda: self._influence, self.protect_ends, held
            )
            blocks = {block.name for block in self.graph.blocks}
            left = self._without(names, options)
            held |= left.held
            hold = (*asked, *(name for name in held if name not in blocks))
            with without_blocks(self.model, names):
                chosen = _plan_left(
                    *(self.graph, left.graph, self.model, names),
                    **{"hold": hold, "seed": self.seed, **options},
                    statistics=given or left.statistics,
                )
            if not verified:
                return chosen, None, held
            certificate = self._prove(chosen, each_group=self.each_group)
            if certificate.verdict != "inexact":
                return chosen, certificate, held
            found = self._reject_blocks(names)
            if found and not isinstance(self.drop, int):
                name, why = next(iter(found.items()))
                raise VerifyError(
                    "without this block the model does not compute what it does when it is skipped",
                    where=name,
                    why=why,
                    fix="drop another block; the model was not touched",
                )
            touched = sum(bool(choice.removed) for choice in chosen.groups)
            if not found:
                found = self._reject_groups(chosen, left.graph)
                if not found or len(found) == touched:
                    raise VerifyError(
                        "the cut model would not compute what the original does without the "
                        "removed units",
                        why=_why_inexact(certificate),
                        fix="the model was not touched; please report the case",
                    )
            held |= found

    def _without(self, names: Sequence[str], options: Mapping[str, Any]) -> _Left:
        """What planning needs to know of the model without these blocks."""
        key = tuple(names)
        if key not in self.known:
            needs = needs_of(options.get("importance", "l2"))
            graph, statistics = self.graph, None
            held: dict[str, str] = {}
            with without_blocks(self.model, names):
                if names:
                    outputs = list(graph.kept_outputs)
                    graph = trace(self.model, self.args, self.kwargs, outputs=outputs)
                if self.mode == "uniform":
                    given = self.kwargs and not self.args
                    inputs = self.kwargs if given else example_inputs(self.model)
                    graph, held = uniform(graph, self.model, inputs)
                if needs and self.data is not None:
                    loss = options.get("loss")
                    statistics = collect(
                        self.model, graph, self.data, needs, loss=loss, seed=self.seed
                    )
            self.known[key] = _Left(graph, held, statistics)
        return self.known[key]

    @cached_property
    def _influence(self) -> dict[str, float]:
        return _influence(self.model, self.graph, self.data, self.args, self.kwargs)

    def _prove(self, chosen: Plan, *, each_group: bool) -> Certificate:
        return verify(
            chosen, self.model, self.args, self.kwargs, each_group=each_group, seed=self.seed
        )

    def _reject_blocks(self, names: Sequence[str]) -> dict[str, str]:
        """The blocks whose absence alone makes the proof fail, with the reason."""
        found: dict[str, str] = {}
        for name in names:
            plan, _ = _plan_depth(self.graph, self.model, [name], self.args, self.kwargs)
            proof = self._prove(plan, each_group=False)
            if proof.verdict == "inexact":
                found[name] = _why_inexact(proof)
        return found

    def _reject_groups(self, chosen: Plan, graph: CouplingGraph) -> dict[str, str]:
        """The groups of a plan that make its proof fail, with the reason."""
        kept = graph.mask_from_positions({a: np.asarray(stay) for a, stay in chosen.keep.items()})

        def fails(mask: Mask) -> str:
            if mask.all():
                return ""
            try:
                with without_blocks(self.model, chosen.drops):
                    part = plan_of_mask(graph, self.model, mask, {"traced": graph.traced})
            except PlanError as error:
                return str(error)
            proof = self._prove(replace(part, drops=chosen.drops), each_group=False)
            return _why_inexact(proof) if proof.verdict == "inexact" else ""

        return find_culprits(graph, kept, fails)


def _why_inexact(proof: Certificate) -> str:
    return proof.reason or f"the outputs differ by {proof.rel_err:.1e}"


def _at_least_one(data: Iterable[Any]) -> Iterable[Any]:
    """The same batches; refused before anything is cut if there are none."""
    batches = iter(data)
    first = list(islice(batches, 1))
    if not first:
        raise DataError(
            "the calibration data is empty",
            why="the iterable gave no batch (an iterator can be used only once)",
            fix="give a DataLoader or a list of batches; the model was not touched",
        )
    return chain(first, batches)
