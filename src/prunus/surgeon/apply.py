"""Apply a plan: all or nothing, in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunus.errors import ApplyError, checks_options
from prunus.graph.axis import Axis
from prunus.graph.plan_records import Renaming
from prunus.graph.plans import Plan
from prunus.graph.program import state_of
from prunus.surgeon.depth import drop_blocks, find_places
from prunus.surgeon.ema import Average, check_scheduler
from prunus.surgeon.optimizer_state import slice_state, write_state
from prunus.surgeon.reach import check_edit, own_copies, write_attribute
from prunus.surgeon.saving import guard_saving
from prunus.surgeon.snapshot import all_or_nothing, copy_config, remember, replace_data
from prunus.surgeon.tensors import add_biases, fit_plan, make_up, slice_tensor
from prunus.tracer.caches import drop_caches
from prunus.tracer.copies import duplicate, stand_in
from prunus.tracer.fakes import FakeRun, unlogged
from prunus.tracer.forward_fn import ForwardFn, entered_as_traced
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.outputs import answer_of
from prunus.tracer.trace import quiet_run, uncollected
from prunus.tracer.wrappers import warn_of_wrappers

Model = TypeVar("Model", bound=nn.Module)


@checks_options
@all_or_nothing
def apply(
    plan: Plan,
    model: Model,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    scheduler: Any = None,
    check: bool = True,
    forward_fn: ForwardFn | None = None,
) -> Model:
    """Make the model physically smaller, in place, or leave it as it was.

    Blocks that the plan drops go first.  Then every tensor is sliced to the kept positions, every
    attribute follows.  Parameters stay the same objects, so that optimizers, hooks and tied names
    keep pointing at them; dtype, device, ``requires_grad``, gradients and train/eval mode stay.

    Parameters
    ----------
    plan
        Made for a model with the same tensors.
    model
        Of a wrapper (``DistributedDataParallel``, ``DataParallel``, ``torch.compile``) the module
        inside is cut, and returned.  A ``DistributedDataParallel`` has to be made anew afterwards,
        which a warning says.
    optimizer
        Its state is cut along, axis by axis; parameters of dropped blocks leave it.  LBFGS starts
        without history, with a warning; what shapes don't tell is refused by name.  Biases that
        layers get are in no group.
    ema
        An average of the weights, which is cut by the same plan: a module of the same parameters,
        or any object that holds one (timm's ``ModelEmaV2`` and ``ModelEmaV3``,
        ``torch.optim.swa_utils.AveragedModel``, ultralytics' ``ModelEMA``).  Tensors that it caches
        of either model are replaced.
    scheduler
        Checked to drive ``optimizer``.  It needs no change, since groups of parameters stay the
        same objects.
    check
        Run the smaller model once on fake tensors and compare the shapes of its outputs with
        those that the plan recorded; on any difference the model is put back.
    forward_fn
        What the model was traced with, where that was not its forward; a plan only says which.

    Raises
    ------
    PlanError
        If the plan is for another model; nothing was changed.
    ApplyError
        If the smaller model does not run or answers in other shapes; it was put back.  If the
        optimizer, the average or the scheduler is that of another model.
    """
    check_scheduler(scheduler, optimizer)
    average = Average(model, ema)
    traced = plan.traced if check else None
    with uncollected(), entered_as_traced(model, traced, forward_fn):
        cut(plan, model, optimizer=optimizer, check=check)
        cut_along(plan, average)
        return model


def cut_along(plan: Plan, average: Average) -> None:
    """Cut what follows a model, which was cut by the same plan and perhaps repaired."""
    for twin in average.twins:
        cut(plan, twin, check=False)
    if average.plain is not None:
        cut(plan, average.plain, check=False)
    average.add_repair()
    average.renew_caches()


def cut_own(plan: Plan, model: Model) -> Model:
    """What :func:`apply` does without a check, to a copy that is thrown away where it fails."""
    with uncollected():
        cut(plan, model, check=False)
    return model


def cut(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    check: bool = True,
) -> None:
    """What :func:`apply` does, for a model that is called as it was traced.

    Where it fails, the model is left half cut: who calls it puts it back.
    """
    before, config = list(model.parameters()), copy_config(model)
    if plan.drops:
        drop_blocks(model, plan.drops)
    whole, plan = plan, fit_plan(plan, state_of(model)[0])
    check_model(plan.widths, model, state_of(model)[0])
    if plan.biases:
        add_biases(model, plan.biases)
    state, aliases = state_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    check_edits(plan, modules)
    moments = []
    if optimizer is not None:
        kept = {id(state[name]): (name, axes) for name, axes in _by_tensor(plan).items()}
        moments = slice_state(optimizer, before, model, kept)
    _slice(plan, model, modules, state, aliases)
    own_copies(model, plan.edits)
    for edit in plan.edits:
        write_attribute(modules[edit.module], edit.attribute, edit.after)
    if plan.traced is not None:
        drop_caches(model, plan.traced.caches)
    if check:
        _check_outputs(plan, model)
    if optimizer is not None:
        write_state(moments)
    _renew(model.modules())
    warn_of_wrappers(model)
    remember(model, whole, config)
    guard_saving(model)


def _slice(
    plan: Plan,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> None:
    """Every tensor of the plan, and its gradient, without the positions that go.

    Magnitudes of weight norms make up for that.
    """
    kept = _by_tensor(plan)
    new = {
        name: slice_tensor(_scaled(plan, name, state[name]), axes) for name, axes in kept.items()
    }
    new |= dict(make_up(model, state, new, kept))
    grads = {
        name: slice_tensor(grad, kept.get(name, {}))
        for name in new
        if state[name].is_leaf and (grad := state[name].grad) is not None
    }
    _swap(modules, state, new, aliases)
    for name, grad in grads.items():
        state[name].grad = grad


def _renew(modules: Iterable[nn.Module]) -> None:
    """What modules keep beside their parameters, and would make anew at their next run."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants them in one piece; nothing happens on CPU
        for hook in module._forward_pre_hooks.values():  # the older norms keep what they compute
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                iterate = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
                with torch.no_grad():
                    weight = hook.compute_weight(module, **iterate)
                if weight.shape != getattr(module, hook.name).shape:
                    setattr(module, hook.name, weight)
            elif isinstance(hook, BasePruningMethod):  # torch.nn.utils.prune: original × mask
                with torch.no_grad():
                    setattr(module, hook._tensor_name, hook.apply_mask(module))


def _scaled(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """The tensor with the plan's factors on it; a copy if there are any."""
    scaled = tensor.detach()
    for scaling in plan.scalings:
        if scaling.tensor == name:
            shape = [-1 if dim == scaling.dim else 1 for dim in range(tensor.dim())]
            factors = torch.ones(tensor.shape[scaling.dim], dtype=torch.float64)
            factors[list(scaling.positions)] = scaling.factor
            scaled = scaled * factors.reshape(shape).to(scaled)
    return scaled


def _by_tensor(plan: Plan) -> dict[str, dict[int, Tensor]]:
    keep: dict[str, dict[int, Tensor]] = {}
    for axis, stay in plan.keep.items():
        keep.setdefault(axis.tensor, {})[axis.dim] = torch.as_tensor(np.asarray(stay))
    return keep


def check_model(plan: Plan, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse another model than the plan's; ``state`` is the model's, by first names."""
    find_places(model, plan.drops)
    names = Renaming(plan.drops)
    left = names.left_of({name: tuple(tensor.shape) for name, tensor in state.items()})
    left = {name: tuple(plan.shapes[name]) for name in plan.biases} | left
    modules = dict(model.named_modules(remove_duplicate=False))
    sliced, written = {axis.tensor for axis in plan.keep}, plan.written
    for name in plan.shapes:
        before = names.before(name)
        if name in written:
            optional = not isinstance(state.get(before), nn.Parameter)
        else:
            optional = name not in sliced and _is_memory(modules, before)
        if optional:
            left[name] = plan.shapes[name]
    own = dict(model.named_parameters(remove_duplicate=False))
    plan.check_model(left, names.left_of({n: tensor for n, tensor in own.items() if n in state}))


def _is_memory(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module has an attribute of that name which is neither parameter nor buffer.

    A forward leaves such tensors behind (anchors for the last size of an image), and a model that
    has not run yet has none, or another.
    """
    prefix, _, own = name.rpartition(".")
    module = modules.get(prefix)
    if module is None or own in module._parameters or own in module._buffers:
        return False
    return inspect.getattr_static(module, own, modules) is not modules


def check_edits(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model whose attributes are not those that the plan changes."""
    for edit in plan.edits:
        check_edit(edit, modules.get(edit.module))


def _swap(
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> None:
    """Put the sliced tensors in place: parameters keep their identity, buffers are replaced."""
    for name, tensor in new.items():
        if isinstance(state[name], nn.Parameter):
            state[name].grad = None  # of the old shape, which torch refuses beside the new data
            replace_data(state[name], tensor)
    for name, first in [*((n, n) for n in new), *aliases.items()]:
        if first in new and not isinstance(state[first], nn.Parameter):
            prefix, _, own = name.rpartition(".")
            module = modules[prefix]
            store = module._buffers if own in module._buffers else vars(module)
            store[own] = new[first]


def _check_outputs(plan: Plan, model: nn.Module) -> None:
    """Run the smaller model, and compare the shapes of what it answers."""
    traced = plan.traced
    if traced is None or traced.inputs is None:
        return
    args, kwargs = rebuild_inputs(traced.inputs, model, varied=False)
    try:
        shapes = output_shapes(model, args, kwargs)
    except Exception as error:  # the user's forward may raise anything
        raise ApplyError(
            "the smaller model does not run",
            why=f"its own forward raised {type(error).__name__}: {error}",
            fix="the model was put back; verify() finds the group that is to blame",
        ) from error
    for name, shape in traced.outputs.items():
        if shapes.get(name) != list(shape):
            raise ApplyError(
                f"output {name!r} has shape {shapes.get(name)}, it should be {list(shape)}",
                why="a part of the model that was not understood depends on a pruned width",
                fix="the model was put back; leave the group out with exclude=",
            )


def output_shapes(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[int]]:
    """Shapes by name; a copy runs on fake tensors, none of which is left anywhere.

    On real ones where the forward reads values.
    """
    run = FakeRun()
    watch = run.watch
    try:
        with unlogged():
            return _run_shapes(stand_in(model).model, args, kwargs, run)
    except Exception:  # a forward may raise anything
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise
    finally:
        del run  # which holds the fakes that it has made
        watch.settle()
    return _run_shapes(duplicate(model), args, kwargs, nullcontext())


def _run_shapes(
    copied: nn.Module, args: Any, kwargs: Any, mode: AbstractContextManager[Any]
) -> dict[str, list[int]]:
    with quiet_run(copied), mode:
        answer = answer_of(copied(*args, **kwargs))
    return {name: list(tensor.shape) for name, tensor in answer.items()}


def kept_axes(plan: Plan) -> dict[Axis, Any]:
    """The plan's positions as arrays."""
    return {axis: np.asarray(stay, dtype=np.int64) for axis, stay in plan.keep.items()}


def differing_axes(plan: Plan, implied: Mapping[Axis, NDArray[np.int64]]) -> Iterator[Axis]:
    """Where a plan keeps other positions than those that follow from the units it keeps."""
    for axis in dict.fromkeys((*plan.keep, *implied)):
        asked, want = plan.keep.get(axis), implied.get(axis)
        if asked is None or want is None or not np.array_equal(np.asarray(asked), want):
            yield axis
