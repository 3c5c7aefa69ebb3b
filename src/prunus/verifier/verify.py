"""Does the pruned model compute what the masked original computes?

The masked original is a replay of the traced program at full size.  It knows the model's tensors
and the labels, and shares no code with the surgeon, which knows index maps only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prunus.errors import PrunusError, VerifyError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of, tensors_of
from prunus.graph.progress import shows
from prunus.surgeon import drop_blocks
from prunus.surgeon.apply import check_model
from prunus.surgeon.tensors import add_biases, fit_plan
from prunus.tracer.copies import duplicate
from prunus.tracer.forward_fn import ForwardFn, entered_as_traced
from prunus.tracer.inputs import positional, rebuild_inputs
from prunus.tracer.precision import full_precision
from prunus.tracer.rerun import say_draws, tied_nodes
from prunus.tracer.trace import forget_caches, uncollected
from prunus.tracer.wrappers import unwraps
from prunus.verifier.case import (
    MOVED,
    Case,
    blaming_the_model,
    each_alone,
    open_gates,
    pays,
    renormalised_groups,
)
from prunus.verifier.depth import compare_depth
from prunus.verifier.differences import parameter_count
from prunus.verifier.judgement import (
    Certificate,
    Judgement,
    Verdict,
    judge,
    judge_as_users_run,
    largest_errors,
    verdict_of,
)
from prunus.verifier.other_ways import breaks_in_training, stale_integers
from prunus.verifier.permutation import INTERCHANGEABLE, relative_error
from prunus.verifier.randomize import Known, randomize
from prunus.verifier.second_shape import NOWHERE, Elsewhere, compare_elsewhere, depth_elsewhere

NOT_INTERCHANGEABLE = "units of one group are not interchangeable: a coupling is missing"

NOT_THE_MODEL = "the traced program does not compute what the model itself does"


@checks_options
@shows("verifying")
@unwraps
def verify(
    plan: Plan,
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    randomise: bool = True,
    each_group: bool = True,
    outputs: Any = None,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    graph: CouplingGraph | None = None,
) -> Certificate:
    """Cut a copy of the model, run its own forward, and compare with the masked original.

    Where the plan drops blocks, the copy without them is first compared with the original that
    skips them (:func:`prunus.verifier.depth.compare_depth`); the rest is verified on that copy.

    Parameters
    ----------
    plan, model
        The plan, and the model before it is applied.  The model is not modified.
    args, kwargs
        Example inputs; without them, random ones of the shapes that the plan was made with.
    randomise
        Randomize a copy first: random statistics for batch norms, values for
        zero-initialised layers, attention logits that matter.  A network at initialisation
        ignores much of what could be wrong.
    each_group
        Also remove every touched group alone, and list those whose removal moves nothing.
    forward_fn
        What the model was traced with, where that was not its forward; a plan only says which.
    graph
        A trace of the model on these inputs, without the blocks that the plan drops, to save one.

    Returns
    -------
    Certificate
        *exact* if the outputs agree within 1e-4 (float32) or 1e-6 (float64), units of one group
        are interchangeable, and removal really moved the outputs; *not verified* if it did not;
        else *inexact*.  Depth amplifies rounding: outputs that differ by more than 1e-4 in
        float32, no more than rounding may explain, are compared again in float64.
    """
    args, kwargs, given = _inputs(plan, model, args, kwargs, seed)
    check_model(plan, model, state_of(model)[0])
    fast_path, wanted = torch.backends.mha.get_fastpath_enabled(), outputs or _kept_outputs(plan)
    task = _Task(plan, args, kwargs, given, wanted, each_group, seed, fast_path)
    with entered_as_traced(model, plan.traced, forward_fn), full_precision(), uncollected():
        return _verify(task, model, graph, randomised=randomise)


def _verify(
    task: _Task, model: nn.Module, graph: CouplingGraph | None, *, randomised: bool
) -> Certificate:
    original = duplicate(model, share=True)  # entered as the model is
    forget_caches(original, task.args, task.kwargs)
    graph = None if task.plan.biases else graph  # which was traced without them
    if task.plan.drops:
        return _verify_depth(task, original, graph, randomised=randomised)
    case = task.case(original, original, graph, "own weights")
    own = _check_own(task, case)
    if randomised:
        for name in ("pruned", "pruned_state"):  # at most two copies are alive at a time
            vars(case).pop(name, None)
        del original
        model, known = _randomised_copy(task, case.original, case.graph, gated=pays(case))
        case = _with_weights(task, case.graph, model, model, known)
    return _certify(task, own, case)


@dataclass(frozen=True)
class _Task:
    """What one call of :func:`verify` is asked."""

    plan: Plan
    args: Any
    kwargs: Mapping[str, Any]
    given: str
    outputs: Any
    each_group: bool
    seed: int
    fast_path: bool

    def case(
        self, original: nn.Module, source: nn.Module, graph: CouplingGraph | None, weights: str
    ) -> Case:
        """``original`` lacks the blocks that the plan drops; ``source`` has them."""
        if self.plan.biases:
            add_biases(original, self.plan.biases)
        plan = fit_plan(self.plan, state_of(original)[0]) if self.plan.written else self.plan
        return Case(
            plan,
            original,
            source,
            self.args,
            self.kwargs,
            outputs=self.outputs,
            traced=graph,
            on=f"{self.given}, {weights}",
            seed=self.seed,
        )


def _inputs(
    plan: Plan, model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """The inputs, and in words where they come from."""
    given = "given inputs"
    if args is None:
        if plan.traced is None or plan.traced.inputs is None:
            raise VerifyError(
                "there are no inputs to verify with",
                why="the plan does not describe those that it was made with",
                fix="give args= (and kwargs=) for the model's forward",
            )
        args, kwargs = rebuild_inputs(plan.traced.inputs, model, seed=seed)
        given = "random inputs of the kind that the plan was made with"
    args = positional(args)
    kwargs = dict(kwargs or {})
    shapes = ["\u00d7".join(map(str, t.shape)) or "scalar" for _, t in tensors_of([args, kwargs])]
    return args, kwargs, f"{given} ({', '.join(shapes)})" if shapes else given


def _randomised_copy(
    task: _Task, own: nn.Module, graph: CouplingGraph | None, *, gated: bool = False
) -> tuple[nn.Module, Known]:
    """A copy with random weights in place of constant ones, and what is known of it."""
    model = duplicate(own)
    with blaming_the_model(f"{task.given}, randomised weights"):
        known = randomize(
            model,
            task.args,
            task.kwargs,
            seed=task.seed,
            graph=graph,
            gated=gated and task.each_group,
        )
    return model, known


def _with_weights(
    task: _Task, own: CouplingGraph, original: nn.Module, source: nn.Module, known: Known
) -> Case:
    """The case of the same plan on other weights; traced again only where the program differs."""
    for graph in (own, None):
        case = task.case(original, source, graph, "randomised weights")
        _give(case, known)
        try:
            if task.each_group:
                open_gates(case)
            if case.follows:
                break
        except PrunusError:
            if graph is None:
                raise
    return case


def _give(case: Case, known: Known) -> None:
    """Spare a case the runs whose outcome is known."""
    if known.answer is not None and not tied_nodes(case.graph.program):
        case.whole = known.answer
    if case.traced is not None:  # gradients and replay are of that program
        case.gradients = known.gradients
        if known.replayed is not None:
            case.dense = known.replayed


def _verify_depth(
    task: _Task, own: nn.Module, graph: CouplingGraph | None, *, randomised: bool
) -> Certificate:
    """First the model without the blocks, then the rest of the plan on that model."""
    models = [own]
    if randomised:
        models.append(_randomised_copy(task, own, None)[0])
    pairs = []
    for model in models:
        without = duplicate(model)  # so that a cut that writes in place is seen
        drop_blocks(without, task.plan.drops)
        pairs.append((model, without))
    certificate = _certify_depth(task, pairs)
    if certificate.verdict == "inexact" or not (task.plan.keep or task.plan.edits):
        return certificate
    case = task.case(pairs[0][1], pairs[0][0], graph, "own weights")
    own_weights = _check_own(task, case)
    if randomised:
        case = _with_weights(task, case.graph, pairs[-1][1], pairs[-1][0], Known())
    widths = _certify(task, own_weights, case)
    order: list[Verdict] = ["inexact", "not verified", "exact"]
    return replace(
        widths,
        verdict=min(certificate.verdict, widths.verdict, key=order.index),
        rel_err=max(certificate.rel_err, widths.rel_err),
        moved=max(certificate.moved, widths.moved),
        moved_alone={**certificate.moved_alone, **widths.moved_alone},
        unverified=(*certificate.unverified, *widths.unverified),
        params=(certificate.params[0], widths.params[1]),
    )


def _certify_depth(task: _Task, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Certificate:
    """Models beside themselves without the blocks; the last pair also shows what moved."""
    with blaming_the_model(f"{task.given}, own weights"):
        compared = [
            compare_depth(
                model,
                without,
                task.plan.drops,
                task.args,
                task.kwargs,
                outputs=task.outputs,
                each=task.each_group and model is pairs[-1][0],
            )
            for model, without in pairs
        ]
    depth = compared[-1]
    reason = next((one.wrong for one in compared if one.wrong), "")
    elsewhere = NOWHERE
    if not reason:
        case = task.case(pairs[-1][0], pairs[-1][0], None, "")
        elsewhere = depth_elsewhere(*pairs[-1], case)
        reason = elsewhere.reason
    weights = ("own weights", "randomised weights")[: len(pairs)]
    return Certificate(
        verdict=verdict_of(reason, depth.moved),
        rel_err=max(elsewhere.rel_err, *(one.rel_err for one in compared)),
        exchanged=0.0,
        moved=depth.moved,
        moved_alone=depth.moved_alone,
        unverified=_unmoved(depth.moved_alone),
        dtype=str(depth.dtype).removeprefix("torch."),
        params=(parameter_count(pairs[0][0]), parameter_count(pairs[0][1])),
        outputs=tuple(depth.outputs),
        reason=reason,
        inputs=(*(f"{task.given}, {kind}" for kind in weights), *elsewhere.inputs),
        unread=task.plan.traced.unread if task.plan.traced else (),
    )


@dataclass(frozen=True)
class _Own:
    """What the user's own weights show, before other weights take their place."""

    case_on: str
    graph: CouplingGraph
    judgement: Judgement
    stale: tuple[str, ...]
    params: tuple[int, int]


def _check_own(task: _Task, case: Case) -> _Own:
    judgement = judge_as_users_run(case, task.fast_path)
    if not judgement.reason:
        judgement = replace(judgement, reason=breaks_in_training(case))
    params = case.graph.cost("params"), parameter_count(case.pruned)
    return _Own(case.on, case.graph, judgement, stale_integers(case), params)


def _certify(task: _Task, own: _Own, main: Case) -> Certificate:
    """Of the user's own weights, and of those on which every unit matters."""
    judged = [own.judgement]
    if main.on != own.case_on:
        judged.append(judge(main))
    alone = each_alone(main) if task.each_group else {}
    reason, elsewhere = _what_is_wrong(main, judged)
    moved = relative_error(main.dense, main.masked)
    exact = all(one.exact for one in judged)
    verdict = verdict_of(reason, moved) if exact else "inexact"
    if verdict == "inexact":
        reason = say_draws(main.graph.program) or reason
    dtype, error, single = largest_errors(judged)
    return Certificate(
        verdict=verdict,
        rel_err=max(error, elsewhere.rel_err) if single is None else error,
        exchanged=main.exchanged,
        moved=moved,
        moved_alone=alone,
        unverified=_unmoved(alone),
        dtype=str(dtype).removeprefix("torch."),
        params=own.params,
        outputs=own.graph.kept_outputs,
        released=_released(task.plan, own.graph),
        renormalised=renormalised_groups(main),
        stale=own.stale,
        reason=reason,
        rel_err32=None if single is None else max(single, elsewhere.rel_err),
        inputs=(*dict.fromkeys((own.case_on, main.on)), *elsewhere.inputs),
        unread=elsewhere.still(own.graph.traced["unread"]),
    )


def _what_is_wrong(main: Case, judged: Sequence[Judgement]) -> tuple[str, Elsewhere]:
    """The first reason that is found, and what another shape shows where nothing else is wrong."""
    reasons = [
        *(one.reason for one in judged),
        "" if main.exchanged <= INTERCHANGEABLE else NOT_INTERCHANGEABLE,
        "" if main.follows else NOT_THE_MODEL,
    ]
    reason = next(filter(None, reasons), "")
    if reason or not all(one.exact for one in judged):
        return reason, NOWHERE
    elsewhere = compare_elsewhere(main)
    return elsewhere.reason, elsewhere


def _unmoved(alone: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(name for name, by in alone.items() if not by > MOVED)


def _kept_outputs(plan: Plan) -> list[str] | None:
    return None if plan.traced is None else list(plan.traced.outputs) or None


def _released(plan: Plan, graph: CouplingGraph) -> tuple[str, ...]:
    """Outputs that may shrink, as the plan says, or the trace where it does not."""
    return tuple(graph.traced["released"] if plan.traced is None else plan.traced.released)
