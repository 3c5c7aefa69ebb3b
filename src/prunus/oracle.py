"""The oracle: does the pruned model compute what the masked original computes?

The masked original is a replay of the traced program at full size.  It knows the model's tensors
and the labels, and shares no code with the surgeon, which knows index maps only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.errors import PrunusError, VerifyError
from prunus.exchange import exchange_error, relative_error, to_double
from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.listening import listen
from prunus.plans import Plan
from prunus.precision import full_precision
from prunus.replay import Replay
from prunus.skipping import prove_depth
from prunus.surgeon import apply, drop_blocks
from prunus.surgeon.apply import check_model
from prunus.surgeon.biases import add_biases
from prunus.tracer.caches import clear_caches
from prunus.tracer.capture import find_line
from prunus.tracer.entry import ForwardFn, entered_as_traced
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.program import duplicate, state_of, tensors_of
from prunus.tracer.trace import quiet_run, trace

Verdict = Literal["exact", "inexact", "not verified"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative error that still counts as exact."""

INTERCHANGEABLE = 1e-4
"""Largest relative change of the outputs when units of one group take another order."""

NOT_INTERCHANGEABLE = "units of one group are not interchangeable: a coupling is missing"

NOT_THE_MODEL = "the traced program does not compute what the model itself does"

DOUBTFUL = 1e-2
"""A float32 difference below this may be rounding that depth amplified; float64 tells."""

AMPLIFIED = 10.0
"""So may a greater one, up to this many times what float64 changes in the masked original."""

MOVED = 1e-3
"""Removing a group has to move the output by this much, or the comparison proves nothing."""


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

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was added after the first format only where there is something."""
        found = asdict(self)
        for name in ("rel_err32", "inputs", "unread", "renormalised", "released"):
            if not found[name] and found[name] != 0:
                del found[name]
        return found


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
        What the model was traced with, where that was a function; a plan knows a method by name.

    Returns
    -------
    Certificate
        *exact* if the outputs agree within 1e-4 (float32) or 1e-6 (float64), units of one group
        are interchangeable, and removal really moved the outputs; *not verified* if it did not;
        else *inexact*.  Depth amplifies rounding: outputs that differ by more than 1e-4 in
        float32, and by less than 1e-2, are compared again in float64 where the model runs in it.
    """
    if args is None:
        if plan.traced is None or plan.traced["inputs"] is None:
            raise VerifyError(
                "there are no inputs to verify with",
                why="the plan does not describe those that it was made with",
                fix="give args= (and kwargs=) for the model's forward",
            )
        args, kwargs = rebuild_inputs(plan.traced["inputs"], model, seed=seed)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    check_model(plan, model, state_of(model)[0])
    wanted = outputs or _kept_outputs(plan)
    options: dict[str, Any] = {"each_group": each_group, "outputs": wanted, "seed": seed}
    with entered_as_traced(model, plan.traced, forward_fn), full_precision():
        original = duplicate(model)  # entered as the model is
        clear_caches(original)
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
    tolerance = TOLERANCE.get(depth.dtype, 1e-4)
    reason = depth.reason
    if not reason and not depth.rel_err <= tolerance:
        reason = "without the blocks the model does not compute what it does when they are skipped"
    verdict: Verdict = "inexact" if reason else "exact" if depth.moved > MOVED else "not verified"
    alone = tuple(name for name, by in depth.moved_alone.items() if not by > MOVED)
    certificate = Certificate(
        verdict=verdict,
        rel_err=depth.rel_err,
        exchanged=0.0,
        moved=depth.moved,
        moved_alone=depth.moved_alone,
        unverified=alone,
        dtype=str(depth.dtype).removeprefix("torch."),
        params=(counts[0], counts[1]),
        outputs=tuple(depth.outputs),
        reason=reason,
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
    add_biases(original, plan.biases)
    found = trace(original, args, kwargs, outputs=outputs)
    inputs = [t.detach() for _, t in tensors_of([args, kwargs])]
    kept = found.mask_from_positions(
        {axis: np.asarray(stay, dtype=np.int64) for axis, stay in plan.keep.items()}
    )
    state, _ = state_of(original)
    replay = Replay(found, state, inputs)
    dense = replay.run(found.all_kept)
    masked = replay.run(kept)
    pruned = copy.deepcopy(source)
    reason = _disagreement(plan, found, kept)
    error = float("inf")
    try:
        apply(plan, pruned, check=False)
        with quiet_run(pruned):
            answer = dict(tensors_of(pruned(*args, **kwargs)))
        error = relative_error(masked, answer)
        reason = reason or _left_behind(original, pruned, found, kept)
    except PrunusError:
        raise
    except Exception as failure:  # the pruned model's own forward may raise anything
        reason = reason or (
            f"the pruned model's forward raised {type(failure).__name__} "
            f"at {find_line(failure)}: {failure}"
        )
    alone = _each_alone(found, kept, replay, dense) if each_group else {}
    touched = [group for group in found.groups if not kept[group.units].all()]
    swapped = exchange_error(found, original, touched, args, kwargs, seed=seed)
    tolerance = TOLERANCE.get(next(iter(masked.values())).dtype, 1e-4)
    if not swapped <= INTERCHANGEABLE:
        reason = reason or NOT_INTERCHANGEABLE
    with quiet_run(original):
        whole = dict(tensors_of(original(*args, **kwargs)))
    if not relative_error(dense, whole) <= tolerance:
        reason = reason or NOT_THE_MODEL
    moved = relative_error(dense, masked)
    dtype, single = next(iter(masked.values())).dtype, None
    if not reason and dtype == torch.float32 and error > tolerance:
        wide = _Wide(original, args, kwargs, found)
        double = None
        if error < DOUBTFUL or error < AMPLIFIED * wide.rounding(kept, masked):
            double = wide.error_of(plan.widths)
        if double is not None and double <= TOLERANCE[torch.float64]:
            dtype, tolerance = torch.float64, TOLERANCE[torch.float64]
            error, single = double, error
    verdict: Verdict = "exact"
    if reason or not error <= tolerance:
        verdict = "inexact"
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
        params=(found.cost("params"), sum(p.numel() for p in pruned.parameters())),
        outputs=found.kept_outputs,
        reason=reason,
        rel_err32=single,
    )


class _Wide:
    """The same comparison in float64, where the model runs the same operators in it."""

    def __init__(
        self, original: nn.Module, args: Any, kwargs: Mapping[str, Any], found: CouplingGraph
    ) -> None:
        self._outputs: Any = found.kept_outputs
        self._graph: CouplingGraph | None = None
        try:
            self._model = copy.deepcopy(original).double()
            self._inputs = to_double((args, kwargs))
            graph = trace(self._model, *self._inputs, outputs=self._outputs)
        except Exception:  # a forward that insists on its own type may raise anything
            return
        if [n.target for n in graph.program.nodes] == [n.target for n in found.program.nodes]:
            self._graph = graph

    def rounding(self, kept: Mask, masked: Mapping[str, Tensor]) -> float:
        """How far the masked original's float32 outputs are from those in float64."""
        if self._graph is None:
            return 0.0
        inputs = [t.detach() for _, t in tensors_of(list(self._inputs))]
        replay = Replay(self._graph, state_of(self._model)[0], inputs)
        return relative_error(replay.run(kept), masked)

    def error_of(self, plan: Plan) -> float | None:
        """The error of the cut model in float64; None where that can't be told."""
        if self._graph is None:
            return None
        options: Any = {"randomise": False, "each_group": False, "outputs": self._outputs}
        try:
            again = verify(plan, self._model, *self._inputs, **options)
        except Exception:  # the cut model's forward may insist on its type where this one did not
            return None
        return None if again.reason or again.dtype != "float64" else again.rel_err


def _disagreement(plan: Plan, found: CouplingGraph, kept: Mask) -> str:
    """Why the plan's index maps are no consistent choice of units; empty if they are."""
    implied = dict(found.positions(kept))
    for axis in (*plan.keep, *implied):
        asked = plan.keep.get(axis)
        want = implied.get(axis)
        if asked is None or want is None or list(asked) != list(want):
            return f"the plan keeps other positions on {axis} than its couplings demand"
    return ""


_STATED: tuple[tuple[Any, Callable[[Any], tuple[int, ...]]], ...] = (
    (nn.Linear, lambda m: (m.out_features, m.in_features)),
    (_ConvTransposeNd, lambda m: (m.in_channels, m.out_channels // m.groups)),
    (_ConvNd, lambda m: (m.out_channels, m.in_channels // m.groups)),
    (_NormBase, lambda m: (m.num_features,)),
    (nn.GroupNorm, lambda m: (m.num_channels,)),
    ((nn.LayerNorm, nn.RMSNorm), lambda m: tuple(m.normalized_shape)),
    (nn.Embedding, lambda m: (m.num_embeddings, m.embedding_dim)),
    (nn.PReLU, lambda m: (m.num_parameters,)),
)
"""What standard modules say of the first dims of their weight, or of their running mean."""


def _left_behind(original: nn.Module, pruned: nn.Module, found: CouplingGraph, kept: Mask) -> str:
    """What a forward does not notice: attributes that it doesn't read, tied weights come apart."""
    modules = dict(pruned.named_modules())
    with quiet_run(original), quiet_run(pruned):  # reading a computed weight may change state
        for name, before in original.named_modules():
            said, shape = _stated(modules.get(name))
            said_before, shape_before = _stated(before)
            if said_before == shape_before and said != shape:
                return f"{name} says {said} of a tensor of shape {shape}: an attribute is stale"
    counts = [sum(p.numel() for p in model.parameters()) for model in (original, pruned)]
    removed = found.cost("params") - found.cost("params", kept)
    if counts[0] - counts[1] != removed:
        return f"the cut removed {counts[0] - counts[1]} parameters, its couplings say {removed}"
    return ""


def _stated(module: nn.Module | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    stated = next((stated for kind, stated in _STATED if isinstance(module, kind)), None)
    named = (getattr(module, name, None) for name in ("weight", "running_mean"))
    tensor = next((value for value in named if isinstance(value, Tensor)), None)
    if stated is None or tensor is None:
        return (), ()
    said = stated(module)
    return said, tuple(tensor.shape[: len(said)])


def _kept_outputs(plan: Plan) -> list[str] | None:
    return None if plan.traced is None else list(plan.traced["outputs"])


def _each_alone(
    found: CouplingGraph, kept: Mask, replay: Replay, dense: Mapping[str, Tensor]
) -> dict[str, float]:
    moved: dict[str, float] = {}
    for group in found.groups:
        if kept[group.units].all():
            continue
        alone = found.all_kept
        alone[group.units] = kept[group.units]
        moved[group.name] = relative_error(dense, replay.run(alone))
    return moved
