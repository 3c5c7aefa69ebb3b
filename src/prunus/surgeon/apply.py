"""Apply a plan: all or nothing, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from prunus.errors import ApplyError
from prunus.graph.axis import Axis
from prunus.plans import Plan
from prunus.surgeon.attributes import read_attribute, write_attribute
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.program import state_of, tensors_of
from prunus.tracer.trace import quiet_run

Model = TypeVar("Model", bound=nn.Module)


def apply(
    plan: Plan,
    model: Model,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    check: bool = True,
) -> Model:
    """Make the model physically smaller, in place, or leave it as it was.

    Every tensor is sliced to the kept positions, every attribute follows.  Parameters stay the
    same objects, so that optimizers, hooks and tied names keep pointing at them; dtype, device,
    ``requires_grad``, gradients and train/eval mode stay.

    Parameters
    ----------
    plan
        Made for a model with the same tensors.
    optimizer
        Its per-parameter state (momenta) is sliced along.
    check
        Run the smaller model once on fake tensors and compare the shapes of its outputs with
        those that the plan recorded; on any difference the model is put back.

    Raises
    ------
    PlanError
        If the plan is for another model; nothing was changed.
    ApplyError
        If the smaller model does not run or answers in other shapes; it was put back.
    """
    state, aliases = state_of(model)
    plan.check_model({name: tuple(tensor.shape) for name, tensor in state.items()})
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_edits(plan, modules)
    new = {
        name: slice_tensor(_scaled(plan, name, state[name]), axes)
        for name, axes in _by_tensor(plan).items()
    }
    grads = {
        name: slice_tensor(grad, axes)
        for name, axes in _by_tensor(plan).items()
        if (grad := state[name].grad) is not None
    }
    undo = Undo(plan, model)
    try:
        _swap(modules, state, new, aliases)
        for name, grad in grads.items():
            state[name].grad = grad
        for edit in plan.edits:
            write_attribute(modules[edit.module], edit.attribute, edit.after)
        if check:
            _check_outputs(plan, model)
        if optimizer is not None:
            _slice_optimizer(optimizer, state, plan)
    except BaseException:
        undo()
        raise
    return model


def slice_tensor(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The positions that stay, dim by dim; contiguous in the tensor's own memory format."""
    sliced = tensor.detach()
    for dim, stay in keep.items():
        sliced = sliced.index_select(dim, stay.to(sliced.device))
    last = torch.channels_last
    if (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=last)
        and not tensor.is_contiguous()
    ):
        return sliced.contiguous(memory_format=last)
    return sliced.contiguous()


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


def _check_edits(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    for edit in plan.edits:
        module = modules.get(edit.module)
        try:
            value = None if module is None else read_attribute(module, edit.attribute)
        except AttributeError:
            value = None
        value = tuple(value) if isinstance(value, list) else value
        if value != edit.before:
            raise ApplyError(
                f"{edit.module}.{edit.attribute} is {value!r}, the plan expects {edit.before!r}",
                where=edit.module,
                why="the plan was made for another model, or the model was changed since",
                fix="trace and plan the model as it is now",
            )


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
            state[name].data = tensor
    for name, first in [*((n, n) for n in new), *aliases.items()]:
        if first in new and not isinstance(state[first], nn.Parameter):
            prefix, _, own = name.rpartition(".")
            module = modules[prefix]
            store = module._buffers if own in module._buffers else vars(module)
            store[own] = new[first]


class Undo:
    """Remembers what :func:`apply` is about to touch, and puts it back."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        state, aliases = state_of(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        touched = {axis.tensor for axis in plan.keep}
        self._state = {name: state[name] for name in touched}
        self._data = {name: (state[name].data, state[name].grad) for name in touched}
        self._aliases = {name: first for name, first in aliases.items() if first in touched}
        self._modules = modules
        self._attributes = [
            (modules[edit.module], edit.attribute, edit.before) for edit in plan.edits
        ]

    def __call__(self) -> None:
        for name, (data, grad) in self._data.items():
            if isinstance(self._state[name], nn.Parameter):
                self._state[name].grad = None
                self._state[name].data = data
                self._state[name].grad = grad
        buffers = {n: t for n, t in self._state.items() if not isinstance(t, nn.Parameter)}
        _swap(self._modules, self._state, buffers, self._aliases)
        for module, attribute, value in self._attributes:
            write_attribute(module, attribute, value)


def _check_outputs(plan: Plan, model: nn.Module) -> None:
    """Run the smaller model on fake tensors, real ones where it reads values."""
    traced = plan.traced
    if traced is None or traced["inputs"] is None:
        return
    spec, expected = traced["inputs"], traced["outputs"]
    args, kwargs = rebuild_inputs(spec, model)
    shapes: dict[str, list[int]] = {}
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    for fake in (True, False):
        try:
            shapes = _output_shapes(model, args, kwargs, fake=fake)
            break
        except Exception as error:
            if not fake or meta:
                raise ApplyError(
                    "the smaller model does not run",
                    why=f"its own forward raised {type(error).__name__}: {error}",
                    fix="the model was put back; verify() finds the group that is to blame",
                ) from error
    for name, shape in expected.items():
        if shapes.get(name) != list(shape):
            raise ApplyError(
                f"output {name!r} has shape {shapes.get(name)}, it should be {list(shape)}",
                why="a part of the model that was not understood depends on a pruned width",
                fix="the model was put back; leave the group out with exclude=",
            )


def _output_shapes(model: nn.Module, args: Any, kwargs: Any, *, fake: bool) -> dict[str, list[int]]:
    with quiet_run(model):
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            args, kwargs = tree_map(
                lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs)
            )
            with mode:
                result = model(*args, **kwargs)
        else:
            result = model(*args, **kwargs)
    return {name: list(tensor.shape) for name, tensor in tensors_of(result)}


def _slice_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], plan: Plan
) -> None:
    for name, axes in _by_tensor(plan).items():
        moments = optimizer.state.get(state[name], {})
        for key, value in moments.items():
            if isinstance(value, Tensor) and tuple(value.shape) == plan.shapes[name]:
                moments[key] = slice_tensor(value, axes)


def kept_axes(plan: Plan) -> dict[Axis, Any]:
    """The plan's positions as arrays."""
    return {axis: np.asarray(stay, dtype=np.int64) for axis, stay in plan.keep.items()}
