"""The second witness: finds what reads the removed units by perturbing them, and silences that.

It knows nothing of traced operators and labels.  Of a plan it takes one thing: which rows of
which layers (and of tensors that belong to no layer) are gone.  Those rows get noise while the
user's Python model runs; every layer whose inputs move in some channels reads the removed units
there.  Then the weights of these layers are zeroed in these columns, and the model as the user
wrote it tells what the pruned one has to say.

Layers are convolutions, linear layers and embeddings.  What anything else does with a removed
unit (attention, a functional matrix product, a parametrization) leaves the question undecided.

Noise does not arrive where a forward writes a constant over a unit.  A layer that reads nothing but
the constant is not found, and the pruned model has lost its column all the same: where the two then
differ, and noise on everything moves no such column, the question is undecided.
"""

# ruff: noqa: PT028 - ``testify`` is no test, whatever its name begins with

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.errors import checks_options
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.tracer.precision import full_precision
from tests.hearing import (
    LAYERS,
    Gone,
    Heard,
    Noise,
    UndecidedError,
    carries_one,
    differ,
    fetch,
    quiet,
    run_noisily,
)

TOLERANCE = {torch.float64: 1e-6}
"""Largest relative error at which the two agree; 1e-4 for every type not named."""

MOVED = 1e-3
"""Silencing the consumers has to move an output by this much, or agreement proves nothing."""

SCALES = (0.3, 3.0, 30.0)
"""Noise in standard deviations of a layer's output: small noise passes saturated activations,
large noise passes dead ones."""

ATTEMPTS = 8
"""How often noise is drawn anew before the witness gives up."""


@dataclass(frozen=True)
class Testimony:
    """What the witness says of a pruned model.

    Attributes
    ----------
    rel_err
        Largest ‖pruned − silenced‖∞ / ‖silenced‖∞ over the outputs; infinite where they can't be
        compared.
    consumers
        Module path → input channels that carry removed units.
    reason
        Why it is undecided, or what could not be compared.
    """

    verdict: Literal["agrees", "disagrees", "undecided"]
    rel_err: float
    consumers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""


class _FailedError(Exception):
    """The pruned model gives nothing to compare."""


@checks_options
def testify(
    plan: Plan,
    model: nn.Module,
    pruned: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Collection[str] | None = None,
) -> Testimony:
    """Compare a pruned model with the original in which the consumers' weights are zeroed.

    Of a plan that drops blocks it says nothing; of ``plan.widths`` it does, given an original that
    has lost them.

    Parameters
    ----------
    plan
        It may touch only units that nothing mixes: removing a unit under a layer norm, a softmax
        or a mean over channels is not the same as silencing whoever reads it.
    model, pruned
        The original, and the model that the plan has cut.  Neither is modified.
    args, kwargs
        Inputs for the forward of both.
    outputs
        Names of the outputs to compare, as ``"logits"``, ``"0"``; by default all.

    Returns
    -------
    Testimony
        *agrees* within 1e-4 relative (1e-6 in float64), *disagrees*, or *undecided*.  A pruned
        model that fails, or answers in another shape, disagrees.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    with full_precision():
        return _testify(plan, model, pruned, args, kwargs, outputs)


def _testify(
    plan: Plan,
    model: nn.Module,
    pruned: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    outputs: Collection[str] | None,
) -> Testimony:
    try:
        if plan.drops:
            raise UndecidedError("the plan drops blocks; give plan.widths and a model without")
        with quiet(own := copy.deepcopy(model)):
            dense = _named(own(*args, **kwargs), outputs)
        with quiet(own := copy.deepcopy(pruned)):
            answer = _answer_of(own, args, kwargs, dense)
        expected, consumers = _silenced_answer(
            model, pruned, _find_gone(plan, model), args, kwargs, dense
        )
        if _relative_error(dense, expected) <= MOVED:
            raise UndecidedError("silencing the consumers moves no output")
    except UndecidedError as undecided:
        return Testimony("undecided", float("nan"), {}, str(undecided))
    except _FailedError as failed:
        return Testimony("disagrees", float("inf"), {}, str(failed))
    error = _relative_error(expected, answer)
    limit = min(TOLERANCE.get(tensor.dtype, 1e-4) for tensor in expected.values())
    if error <= limit:
        return Testimony("agrees", error, consumers)
    if constant := _reads_constants(plan, model, consumers, args, kwargs):
        return Testimony("undecided", float("nan"), consumers, f"{constant} reads a constant")
    return Testimony("disagrees", error, consumers)


def _answer_of(
    pruned: nn.Module, args: Any, kwargs: Any, dense: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the pruned model answers; it has to answer in the original's shapes."""
    try:
        found = pruned(*args, **kwargs)
    except Exception as failure:  # the pruned model's own forward may raise anything
        told = f"the pruned model's forward raised {type(failure).__name__}: {failure}"
        raise _FailedError(told) from failure
    answer = _named(found, dense)
    for name, tensor in dense.items():
        shape = tuple(answer[name].shape) if name in answer else None
        if shape != tuple(tensor.shape):
            raise _FailedError(f"output {name!r} has shape {shape}, not {tuple(tensor.shape)}")
    return answer


def _silenced_answer(
    model: nn.Module,
    pruned: nn.Module,
    gone: Gone,
    args: Any,
    kwargs: Any,
    dense: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The model's answer with all consumers silenced, and the consumers.

    A dead activation may hide a unit, so noise is drawn anew until silencing what was found
    silences the rows: noise on them then reaches no output any more.
    """
    subject = copy.deepcopy(model)
    clean = run_noisily(subject, gone, None, None, args, kwargs)
    if still := [name for name in gone.rows if name not in clean.ran]:
        raise UndecidedError(f"{', '.join(still)} never runs: its weight is read by other code")
    again = run_noisily(subject, gone, None, clean, args, kwargs)
    untouched = _named(clean.answer, dense)
    _compare_runs(untouched, again, "the model does not answer the same twice")
    if _relative_error(dense, untouched) > MOVED or any(at.any() for at in again.moved.values()):
        raise UndecidedError("the model does not answer the same twice")
    moved: dict[str, Any] = {}
    consumers: dict[str, tuple[int, ...]] = {}
    for attempt in range(ATTEMPTS):
        for scale in SCALES:
            noisy = run_noisily(subject, gone, Noise(scale, 2 * attempt), clean, args, kwargs)
            _compare_runs(untouched, noisy, "a removed unit reaches an output past all layers")
            for name, channels in noisy.moved.items():
                moved[name] = moved.get(name, False) | channels
            _refuse_passengers(model, pruned, noisy)
        found = {n: tuple(np.flatnonzero(at).tolist()) for n, at in moved.items() if at.any()}
        if found == consumers and attempt:
            continue
        consumers = found
        silent = _silence(model, consumers)
        with quiet(silent):
            answer = _named(silent(*args, **kwargs), dense)
        if _is_silent(silent, gone, answer, 2 * attempt + 1, args, kwargs):
            return answer, consumers
    raise UndecidedError(
        "noise on the removed units reaches an output although all layers that read it are silent"
    )


def _reads_constants(
    plan: Plan, model: nn.Module, consumers: Mapping[str, tuple[int, ...]], args: Any, kwargs: Any
) -> str:
    """A layer that loses columns which no removed unit moves, nor anything else; else nothing.

    A wrong column is moved by some other unit, and remains an objection.
    """
    lost = {name: np.setdiff1d(at, consumers.get(name, ())) for name, at in _columns(plan, model)}
    lost = {name: at for name, at in lost.items() if len(at)}
    if not lost:
        return ""
    rows = {
        name: np.arange(fetch(model, f"{name}.weight").shape[int(isinstance(module, nn.Embedding))])
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
        and not isinstance(module, _ConvTransposeNd)
        and module._parameters.get("weight") is not None
    }
    everything = Gone(rows, {})
    subject = copy.deepcopy(model)
    try:
        clean = run_noisily(subject, everything, None, None, args, kwargs)
        moved = [
            run_noisily(subject, everything, Noise(scale, seed), clean, args, kwargs).moved
            for seed, scale in enumerate(SCALES)
        ]
    except UndecidedError:  # an attention, say, that everything moves
        return ""
    still = (n for n, at in lost.items() if not any(run[n][at].any() for run in moved if n in run))
    return next(still, "")


def _columns(plan: Plan, model: nn.Module) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Layers over one block of channels, and the input channels that a plan takes from them."""
    for axis, stay in plan.keep.items():
        name, _, own = axis.tensor.rpartition(".")
        module = model.get_submodule(name)
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
        )
        if own == "weight" and axis.dim == 1 and plain and getattr(module, "groups", 1) == 1:
            size = plan.shapes[axis.tensor][1]
            yield name, np.setdiff1d(np.arange(size), np.array(stay))


def _refuse_passengers(model: nn.Module, pruned: nn.Module, run: Heard) -> None:
    """A layer over tokens, say, that channels pass through one by one: it reads none of them.

    Then noise moves all that the layer sums over, at some places only, and it stays whole.
    """
    for name in run.patchy:
        before, after = (fetch(m, f"{name}.weight").shape for m in (model, pruned))
        dim = 0 if isinstance(model.get_submodule(name), _ConvTransposeNd) else 1
        if before[dim] == after[dim]:
            raise UndecidedError(f"removed units pass through {name} without being summed over")


def _compare_runs(dense: Mapping[str, Tensor], run: Heard, reason: str) -> None:
    answer = _named(run.answer, dense)
    if any(differ(tensor, answer[name]).any() for name, tensor in dense.items()):
        raise UndecidedError(reason)


def _find_gone(plan: Plan, model: nn.Module) -> Gone:
    owners = {id(fetch(model, axis.tensor)): axis.tensor for axis in plan.keep}

    def lost(tensor: Tensor, dim: int) -> NDArray[np.int64]:
        stay = plan.keep.get(Axis(owners.get(id(tensor), ""), dim))
        everything = np.arange(tensor.shape[dim])
        return np.setdiff1d(everything, everything if stay is None else np.array(stay))

    tables: dict[str, dict[int, NDArray[np.int64]]] = {}
    for axis in plan.keep:
        if _is_table(model, axis):
            found = lost(fetch(model, axis.tensor), axis.dim)
            tables.setdefault(axis.tensor, {})[axis.dim] = found
    rows: dict[str, NDArray[np.int64]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, LAYERS) or weight is None or carries_one(module):
            continue
        if isinstance(module, _ConvTransposeNd):
            channels = _transposed_rows(lost(weight, 0), lost(weight, 1), module)
        else:
            channels = lost(weight, 1 if isinstance(module, nn.Embedding) else 0)
        if len(channels):
            rows[name] = channels
    if not rows and not tables:
        raise UndecidedError("the plan removes no row of a layer")
    return Gone(rows, tables)


def _is_table(model: nn.Module, axis: Axis) -> bool:
    """Whether the tensor belongs to no standard module; refuses what noise can't be added to."""
    module = model.get_submodule(axis.tensor.rpartition(".")[0].partition(".parametrizations")[0])
    computed = isinstance(module, LAYERS) and "weight" not in module._parameters
    if computed or isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        raise UndecidedError(f"{axis} is not a plain weight of a layer")
    standard = any(
        kind.__module__.startswith("torch.nn.modules.")
        for kind in type(module).__mro__
        if kind is not nn.Module and "container" not in kind.__module__
    )
    if not standard and not fetch(model, axis.tensor).is_floating_point():
        raise UndecidedError(f"{axis} holds indices, to which noise can't be added")
    return not standard


def _transposed_rows(
    ins: NDArray[np.int64], outs: NDArray[np.int64], module: _ConvTransposeNd
) -> NDArray[np.int64]:
    """Output channels that go: the same of every block, and those of blocks without inputs."""
    blocks, per_block = module.groups, module.weight.shape[1]
    lost = np.zeros((blocks, per_block), dtype=np.bool_)
    lost[:, outs] = True
    inputs = module.weight.shape[0] // blocks
    lost[np.bincount(ins // inputs, minlength=blocks) == inputs] = True
    return np.flatnonzero(lost.ravel())


def _silence(model: nn.Module, consumers: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy whose layers do not read the given input channels; tied weights come apart."""
    silent = copy.deepcopy(model)
    for name, channels in consumers.items():
        layer: Any = silent.get_submodule(name)
        if layer._parameters.get("weight") is None:
            raise UndecidedError(f"{name} reads removed units, and its weight is computed")
        weight = layer.weight.detach().clone()
        if isinstance(layer, _ConvTransposeNd):
            weight[list(channels)] = 0
        else:
            blocks = getattr(layer, "groups", 1)
            outs, ins = weight.shape[0] // blocks, weight.shape[1]
            for block, column in (divmod(channel, ins) for channel in channels):
                weight[block * outs : (block + 1) * outs, column] = 0
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return silent


def _is_silent(
    silent: nn.Module,
    gone: Gone,
    before: Mapping[str, Tensor],
    seed: int,
    args: Any,
    kwargs: Any,
) -> bool:
    """Whether noise on the rows reaches no output, when no layer's input is put right."""
    for scale in SCALES:
        with Noise(scale, seed).on(silent, gone), quiet(silent):
            after = _named(silent(*args, **kwargs), before)
        if not _relative_error(before, after) <= TOLERANCE[torch.float64]:
            return False
    return True


def _named(answer: Any, wanted: Collection[str] | None) -> dict[str, Tensor]:
    found = {n: t for n, t in _tensors(answer) if wanted is None or n in wanted}
    if not found:
        raise UndecidedError("there is no output to compare")
    return found


def _tensors(answer: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in sequences, mappings and dataclasses, with dotted names."""
    if isinstance(answer, Tensor):
        yield path or "output", answer
        return
    parts: Any = ()
    if isinstance(answer, Mapping):
        parts = answer.items()
    elif isinstance(answer, (list, tuple)):
        parts = zip(getattr(answer, "_fields", range(len(answer))), answer, strict=True)
    elif is_dataclass(answer) and not isinstance(answer, type):
        parts = ((part.name, getattr(answer, part.name)) for part in fields(answer))
    for name, part in parts:
        yield from _tensors(part, f"{path}.{name}" if path else str(name))


def _relative_error(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    worst = 0.0
    for name, tensor in reference.items():
        if name not in other or other[name].shape != tensor.shape:
            return float("inf")
        if tensor.numel():
            a, b = tensor.double(), other[name].double()
            gap, scale = (a - b).abs().max().item(), a.abs().max().item()
            worst = max(worst, gap / scale if scale else float(gap > 0)) if gap == gap else np.inf
    return worst
