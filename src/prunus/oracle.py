"""The oracle: does the pruned model compute what the masked original computes?

The masked original is a replay of the traced program at full size.  It knows the model's tensors
and the labels, and shares no code with the surgeon, which knows index maps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.errors import VerifyError, checks_options
from prunus.exchange import exchange_error, relative_error
from prunus.listening import listen
from prunus.plans import Plan
from prunus.precision import full_precision
from prunus.skipping import prove_depth
from prunus.surgeon import drop_blocks
from prunus.surgeon.apply import check_model
from prunus.surgeon.biases import add_biases
from prunus.surgeon.fit import fit_plan
from prunus.tracer.entry import ForwardFn, entered_as_traced
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.program import duplicate, state_of
from prunus.tracer.randomness import say_draws
from prunus.tracer.trace import forget_caches
from prunus.verifier.case import Case
from prunus.verifier.comparison import compare, tolerance
from prunus.verifier.effect import MOVED, each_alone
from prunus.verifier.other_ways import stale_integers
from prunus.verifier.paths import other_path
from prunus.verifier.renormalised import renormalised_groups
from prunus.verifier.rounding import error_in_float64
from prunus.verifier.second_shape import (
    Elsewhere,
    as_traced,
    compare_elsewhere,
    depth_elsewhere,
)
from prunus.verifier.structure import other_count, other_positions, stale_attribute

Verdict = Literal["exact", "inexact", "not verified"]

INTERCHANGEABLE = 1e-4
"""Largest relative change of the outputs when units of one group take another order."""

NOT_INTERCHANGEABLE = "units of one group are not interchangeable: a coupling is missing"

NOT_THE_MODEL = "the traced program does not compute what the model itself does"


@checks_options
@dataclass(frozen=True)
class Certificate:
    """What was compared, and the verdict.

    Attributes
    ----------
    rel_err
        Largest ‖pruned − masked‖∞ / ‖masked‖∞ over the outputs, in ``dtype``.
    exchanged
        The same measure between the original and itself with the units of every touched group in
        another order (:mod:`prunus.exchange`).
    moved
        The same measure between the masked and the untouched original.
    moved_alone
        The same with each touched group removed alone, and each dropped block skipped alone.
    unverified
        Groups and blocks whose removal alone moves no output by more than 1e-3: nothing is proven
        of them.
    rel_err32
        The error in float32, where it was above 1e-4 and float64 showed that it is rounding.
    inputs
        A line for each input on which the pruned model and the masked original were compared.
    unread
        Parameters that no compared forward read: nothing is verified of them.
    renormalised
        Groups whose removal changes kept weights (weights computed from weights, as in spectral
        norm), with the relative distance of the outputs to plain silencing.
    released
        Outputs that may shrink: caches and the side outputs of transformers' output classes.
    stale
        Integers of modules that equal a removed width and that no run forward reads, and other
        forwards of a module that no longer compute what the traced one does.
    """

    verdict: Verdict
    rel_err: float
    exchanged: float
    moved: float
    moved_alone: Mapping[str, float]
    unverified: tuple[str, ...]
    dtype: str
    params: tuple[int, int]
    outputs: tuple[str, ...]
    reason: str = ""
    rel_err32: float | None = None
    inputs: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    renormalised: Mapping[str, float] = field(default_factory=dict)
    released: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was added after the first format only where there is something."""
        found = asdict(self)
        for name in ("rel_err32", "inputs", "unread", "renormalised", "released", "stale"):
            if not found[name] and found[name] != 0:
                del found[name]
        return found


@checks_options
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
) -> Certificate:
    """Cut a copy of the model, run its own forward, and compare with the masked original.

    Where the plan drops blocks, the copy without them is first compared with the original that
    skips them (:func:`prunus.skipping.prove_depth`); the rest is then proven of that copy.

    Parameters
    ----------
    plan, model
        The plan, and the model before it is applied.  The model is not modified.
    args, kwargs
        Example inputs; without them, random ones of the shapes that the plan was made with.
    randomise
        Let the copies listen first: random statistics for batch norms, values for
        zero-initialised layers, attention logits that matter.  A network at initialisation
        ignores much of what could be wrong.
    each_group
        Also remove every touched group alone, and list those whose removal moves nothing.
    forward_fn
        What the model was traced with, where that was not its forward; a plan only says which.

    Returns
    -------
    Certificate
        *exact* if the outputs agree within 1e-4 (float32) or 1e-6 (float64), units of one group
        are interchangeable, and removal really moved the outputs; *not verified* if it did not;
        else *inexact*.  Depth amplifies rounding: outputs that differ by more than 1e-4 in
        float32, and by less than 1e-2, are compared again in float64 where the model runs in it.
    """
    if args is None:
        if plan.traced is None or plan.traced.inputs is None:
            raise VerifyError(
                "there are no inputs to verify with",
                why="the plan does not describe those that it was made with",
                fix="give args= (and kwargs=) for the model's forward",
            )
        args, kwargs = rebuild_inputs(plan.traced.inputs, model, seed=seed)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    check_model(plan, model, state_of(model)[0])
    wanted = outputs or _kept_outputs(plan)
    options: dict[str, Any] = {"each_group": each_group, "outputs": wanted, "seed": seed}
    with entered_as_traced(model, plan.traced, forward_fn), full_precision():
        original = duplicate(model)  # entered as the model is
        forget_caches(original, args, kwargs)
        if randomise:
            listen(original, args, kwargs, seed=seed)
        if plan.drops:
            return _verify_depth(plan, original, args, kwargs, **options)
        return _verify_widths(plan, original, original, args, kwargs, **options)


def _verify_depth(
    plan: Plan, original: nn.Module, args: Any, kwargs: Mapping[str, Any], **options: Any
) -> Certificate:
    """First the model without the blocks, then the rest of the plan on that model."""
    without = duplicate(original)
    drop_blocks(without, plan.drops)
    depth = prove_depth(
        original,
        without,
        plan.drops,
        args,
        kwargs,
        outputs=options["outputs"],
        each=options["each_group"],
    )
    counts = [sum(p.numel() for p in m.parameters()) for m in (original, without)]
    reason = depth.reason
    if not reason and not depth.rel_err <= tolerance(depth.dtype):
        reason = "without the blocks the model does not compute what it does when they are skipped"
    elsewhere = Elsewhere(0.0, "", (as_traced(args, kwargs),))
    if not reason:
        case = Case(plan, original, original, args, kwargs, outputs=options["outputs"])
        elsewhere = depth_elsewhere(original, without, case)
        reason = elsewhere.reason
    verdict: Verdict = "inexact" if reason else "exact" if depth.moved > MOVED else "not verified"
    alone = tuple(name for name, by in depth.moved_alone.items() if not by > MOVED)
    certificate = Certificate(
        verdict=verdict,
        rel_err=max(depth.rel_err, elsewhere.rel_err),
        exchanged=0.0,
        moved=depth.moved,
        moved_alone=depth.moved_alone,
        unverified=alone,
        dtype=str(depth.dtype).removeprefix("torch."),
        params=(counts[0], counts[1]),
        outputs=tuple(depth.outputs),
        reason=reason,
        inputs=elsewhere.inputs,
    )
    if verdict == "inexact" or not (plan.keep or plan.edits):
        return certificate
    widths = _verify_widths(plan, without, original, args, kwargs, **options)
    order: list[Verdict] = ["inexact", "not verified", "exact"]
    return replace(
        widths,
        verdict=min(verdict, widths.verdict, key=order.index),
        rel_err=max(depth.rel_err, widths.rel_err),
        moved=max(depth.moved, widths.moved),
        moved_alone={**depth.moved_alone, **widths.moved_alone},
        unverified=(*alone, *widths.unverified),
        params=(counts[0], widths.params[1]),
    )


def _verify_widths(
    plan: Plan,
    original: nn.Module,
    source: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    *,
    each_group: bool,
    outputs: Any,
    seed: int,
) -> Certificate:
    """Of ``original``, which lacks the blocks that the plan drops; ``source`` has them.

    Biases that the plan adds are zeros.
    """
    plan = fit_plan(plan, state_of(original)[0])
    add_biases(original, plan.biases)
    case = Case(plan, original, source, args, kwargs, outputs=outputs)
    compared = compare(case)
    reason = other_positions(case) or compared.reason
    reason = reason or stale_attribute(case) or other_count(case) or other_path(case)
    alone = each_alone(case) if each_group else {}
    swapped = _exchanged(case, seed)
    if not swapped <= INTERCHANGEABLE:
        reason = reason or NOT_INTERCHANGEABLE
    limit = tolerance(case.dtype)
    if not relative_error(case.dense, case.whole) <= limit:
        reason = reason or NOT_THE_MODEL
    moved = relative_error(case.dense, case.masked)
    error, single, dtype = compared.rel_err, None, case.dtype
    if not reason and dtype == torch.float32 and error > limit:
        double = error_in_float64(case, error)
        if double is not None:
            dtype, error, single = torch.float64, double, error
    elsewhere = Elsewhere(0.0, "", (as_traced(args, kwargs),))
    if not reason and error <= tolerance(dtype):
        elsewhere = compare_elsewhere(case)
        error, reason = max(error, elsewhere.rel_err), elsewhere.reason
    verdict: Verdict = "exact"
    if reason or not error <= tolerance(dtype):
        verdict, reason = "inexact", say_draws(case.graph.program) or reason
    elif not moved > MOVED:
        verdict = "not verified"
    return Certificate(
        verdict=verdict,
        rel_err=error,
        exchanged=swapped,
        moved=moved,
        moved_alone=alone,
        unverified=tuple(name for name, by in alone.items() if not by > MOVED),
        dtype=str(dtype).removeprefix("torch."),
        params=(case.graph.cost("params"), sum(p.numel() for p in case.pruned.parameters())),
        outputs=case.graph.kept_outputs,
        released=_released(plan, case),
        renormalised=renormalised_groups(case),
        stale=stale_integers(case),
        reason=reason,
        rel_err32=single,
        inputs=elsewhere.inputs,
    )


def _exchanged(case: Case, seed: int) -> float:
    touched = [group for group in case.graph.groups if not case.kept[group.units].all()]
    return exchange_error(case.graph, case.original, touched, case.args, case.kwargs, seed=seed)


def _kept_outputs(plan: Plan) -> list[str] | None:
    return None if plan.traced is None else list(plan.traced.outputs)


def _released(plan: Plan, case: Case) -> tuple[str, ...]:
    """Outputs that may shrink, as the plan says, or the trace where it does not."""
    return tuple(case.graph.traced["released"] if plan.traced is None else plan.traced.released)
