"""The oracle: does the pruned model compute what the masked original computes?

The masked original is a replay of the traced program at full size.  It knows the model's tensors
and the labels, and shares no code with the surgeon, which knows index maps only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.errors import PrunusError, VerifyError, checks_options
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.graph.program import state_of, tensors_of
from prunus.graph.progress import shows
from prunus.surgeon import drop_blocks
from prunus.surgeon.apply import check_model
from prunus.surgeon.biases import add_biases
from prunus.surgeon.fit import fit_plan
from prunus.tracer.copies import duplicate
from prunus.tracer.forward_fn import ForwardFn, entered_as_traced
from prunus.tracer.inputs import positional, rebuild_inputs
from prunus.tracer.precision import full_precision
from prunus.tracer.randomness import say_draws, tied_nodes
from prunus.tracer.trace import forget_caches, uncollected
from prunus.tracer.wrappers import unwraps
from prunus.verifier.case import Case, tolerance
from prunus.verifier.depth import prove_depth
from prunus.verifier.effect import MOVED, each_alone, open_gates
from prunus.verifier.judgement import Judgement, judge, judge_as_users_run
from prunus.verifier.other_ways import stale_integers
from prunus.verifier.permutation import INTERCHANGEABLE, relative_error
from prunus.verifier.randomize import randomise as randomise_weights
from prunus.verifier.renormalised import renormalised_groups
from prunus.verifier.second_shape import Elsewhere, compare_elsewhere, depth_elsewhere
from prunus.verifier.training import breaks_in_training

Verdict = Literal["exact", "inexact", "not verified"]

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
        another order (:mod:`prunus.verifier.permutation`).
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

    def __str__(self) -> str:
        if self.verdict == "inexact":
            return f"inexact: {self.reason or f'the outputs differ by {self.rel_err:.1e}'}"
        if self.verdict == "not verified":
            return f"not verified: {self.reason or 'no measurable effect on the outputs'}"
        return (
            f"verified (exact): max relative error {self.rel_err:.1e} against the masked model; "
            f"pruning changed the outputs by {self.moved:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was added after the first format only where there is something."""
        found = asdict(self)
        for name in ("rel_err32", "inputs", "unread", "renormalised", "released", "stale"):
            if not found[name] and found[name] != 0:
                del found[name]
        return found


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
) -> Certificate:
    """Cut a copy of the model, run its own forward, and compare with the masked original.

    Where the plan drops blocks, the copy without them is first compared with the original that
    skips them (:func:`prunus.verifier.depth.prove_depth`); the rest is then proven of that copy.

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
    return verify_traced(
        plan,
        model,
        args,
        kwargs,
        randomised=randomise,
        each_group=each_group,
        outputs=outputs,
        forward_fn=forward_fn,
        seed=seed,
    )


def verify_traced(
    plan: Plan,
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    randomised: bool = True,
    each_group: bool = True,
    outputs: Any = None,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    graph: CouplingGraph | None = None,
) -> Certificate:
    """What :func:`verify` does; ``graph`` is a trace of the model, without the dropped blocks."""
    args, kwargs, given = _inputs(plan, model, args, kwargs, seed)
    check_model(plan, model, state_of(model)[0])
    task = _Task(
        plan,
        args,
        kwargs,
        given,
        outputs or _kept_outputs(plan),
        each_group,
        seed,
        torch.backends.mha.get_fastpath_enabled(),
    )
    with entered_as_traced(model, plan.traced, forward_fn), full_precision(), uncollected():
        return _verify(task, model, graph, randomised=randomised)


def _verify(
    task: _Task, model: nn.Module, graph: CouplingGraph | None, *, randomised: bool
) -> Certificate:
    own = duplicate(model, share=True)  # entered as the model is
    forget_caches(own, task.args, task.kwargs)
    if task.plan.drops:
        return _verify_depth(task, own, graph, randomised=randomised)
    case = task.case(own, own, graph, "own weights")
    return _verify_widths(task, case, _randomised(task, case) if randomised else None)


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
            graph=None if self.plan.biases else graph,
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


def _randomised(task: _Task, own: Case) -> Case:
    """The same with weights of which every one matters."""
    model, answer = _listening(task, own.original, own.graph)
    return _with_weights(task, own, model, model, answer)


def _listening(
    task: _Task, own: nn.Module, graph: CouplingGraph | None
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """A copy with random weights in place of constant ones, and what it answers if known."""
    model = duplicate(own)
    with task.case(own, own, None, "randomised weights").blaming_the_model():
        answer = randomise_weights(model, task.args, task.kwargs, seed=task.seed, graph=graph)
    return model, answer


def _with_weights(
    task: _Task,
    own: Case,
    original: nn.Module,
    source: nn.Module,
    answer: dict[str, Tensor] | None,
) -> Case:
    """The case of the same plan on other weights; traced again only where the program differs."""
    for graph in (own.graph, None):
        case = task.case(original, source, graph, "randomised weights")
        if answer is not None and not tied_nodes(case.graph.program):
            case.whole = answer
        try:
            if task.each_group:
                open_gates(case)
            if case.follows:
                break
        except PrunusError:
            if graph is None:
                raise
    return case


def _verify_depth(
    task: _Task, own: nn.Module, graph: CouplingGraph | None, *, randomised: bool
) -> Certificate:
    """First the model without the blocks, then the rest of the plan on that model."""
    models = [own]
    if randomised:
        models.append(_listening(task, own, None)[0])
    pairs = []
    for model in models:
        without = duplicate(model)  # so that a cut that writes in place is seen
        drop_blocks(without, task.plan.drops)
        pairs.append((model, without))
    certificate = _compare_depth(task, pairs)
    if certificate.verdict == "inexact" or not (task.plan.keep or task.plan.edits):
        return certificate
    case = task.case(pairs[0][1], pairs[0][0], graph, "own weights")
    main = _with_weights(task, case, pairs[-1][1], pairs[-1][0], None) if randomised else None
    widths = _verify_widths(task, case, main)
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


def _compare_depth(task: _Task, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> Certificate:
    """Models beside themselves without the blocks; of the last pair it is also told what moved."""
    proofs = []
    with task.case(pairs[0][0], pairs[0][0], None, "own weights").blaming_the_model():
        for model, without in pairs:
            proofs.append(
                prove_depth(
                    model,
                    without,
                    task.plan.drops,
                    task.args,
                    task.kwargs,
                    outputs=task.outputs,
                    each=task.each_group and model is pairs[-1][0],
                )
            )
    depth = proofs[-1]
    reason = next((proof.reason for proof in proofs if proof.reason), "")
    error = max(proof.rel_err for proof in proofs)
    if not reason and not error <= tolerance(depth.dtype):
        reason = "without the blocks the model does not compute what it does when they are skipped"
    elsewhere = Elsewhere(0.0, "", ())
    if not reason:
        case = task.case(pairs[-1][0], pairs[-1][0], None, "")
        elsewhere = depth_elsewhere(*pairs[-1], case)
        reason = elsewhere.reason
    verdict: Verdict = "inexact" if reason else "exact" if depth.moved > MOVED else "not verified"
    counts = [sum(p.numel() for p in model.parameters()) for model in pairs[0]]
    weights = ("own weights", "randomised weights")
    lines = (f"{task.given}, {kind}" for kind, _ in zip(weights, pairs, strict=False))
    return Certificate(
        verdict=verdict,
        rel_err=max(error, elsewhere.rel_err),
        exchanged=0.0,
        moved=depth.moved,
        moved_alone=depth.moved_alone,
        unverified=tuple(n for n, by in depth.moved_alone.items() if not by > MOVED),
        dtype=str(depth.dtype).removeprefix("torch."),
        params=(counts[0], counts[1]),
        outputs=tuple(depth.outputs),
        reason=reason,
        inputs=(*lines, *elsewhere.inputs[1:]),
        unread=task.plan.traced.unread if task.plan.traced else (),
    )


def _verify_widths(task: _Task, own: Case, other: Case | None) -> Certificate:
    """Of the user's own weights, and of others on which every unit matters."""
    main = own if other is None else other
    judged = [judge_as_users_run(own, task.fast_path)]
    if other is not None:
        judged.append(judge(other))
    reason = next((one.reason for one in judged if one.reason), "")
    alone = each_alone(main) if task.each_group else {}
    if not main.exchanged <= INTERCHANGEABLE:
        reason = reason or NOT_INTERCHANGEABLE
    if not main.follows:
        reason = reason or NOT_THE_MODEL
    reason = reason or breaks_in_training(own)
    moved = relative_error(main.dense, main.masked)
    verdict: Verdict = "exact" if moved > MOVED else "not verified"
    elsewhere = Elsewhere(0.0, "", ())
    if not reason and all(one.exact for one in judged):
        elsewhere = compare_elsewhere(main)
        reason = elsewhere.reason
    if reason or not all(one.exact for one in judged):
        verdict, reason = "inexact", say_draws(main.graph.program) or reason
    dtype, error, single = _errors(judged)
    return Certificate(
        verdict=verdict,
        rel_err=max(error, elsewhere.rel_err) if single is None else error,
        exchanged=main.exchanged,
        moved=moved,
        moved_alone=alone,
        unverified=tuple(name for name, by in alone.items() if not by > MOVED),
        dtype=str(dtype).removeprefix("torch."),
        params=(own.graph.cost("params"), sum(p.numel() for p in own.pruned.parameters())),
        outputs=own.graph.kept_outputs,
        released=_released(task.plan, own),
        renormalised=renormalised_groups(main),
        stale=stale_integers(own),
        reason=reason,
        rel_err32=None if single is None else max(single, elsewhere.rel_err),
        inputs=(
            *(case.on for case in (own, other) if case is not None),
            *elsewhere.inputs[1:],
        ),
        unread=elsewhere.still(own.graph.traced["unread"]),
    )


def _errors(judged: Sequence[Judgement]) -> tuple[torch.dtype, float, float | None]:
    """The type in which was judged, the largest error in it, and that in float32 if it is wider."""
    wide = [one for one in judged if one.rel_err32 is not None]
    dtype = (wide or judged)[-1].dtype
    error = max(one.rel_err for one in judged if one.dtype == dtype or not one.exact)
    if not wide:
        return dtype, error, None
    return dtype, error, max(one.rel_err32 or one.rel_err for one in judged)


def _kept_outputs(plan: Plan) -> list[str] | None:
    return None if plan.traced is None else list(plan.traced.outputs) or None


def _released(plan: Plan, case: Case) -> tuple[str, ...]:
    """Outputs that may shrink, as the plan says, or the trace where it does not."""
    return tuple(case.graph.traced["released"] if plan.traced is None else plan.traced.released)
