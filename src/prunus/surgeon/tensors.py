"""What a plan does to single tensors: which of them fit it, slices, magnitudes of weight norms.

Layers without a bias may get one that is zero, so that it can take up a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunus.errors import ApplyError, ModelError
from prunus.graph.axis import Axis
from prunus.graph.plans import Plan
from prunus.surgeon.snapshot import Snapshot
from prunus.tracer.renormalised import find_weight_norms, norms_of


def fit_plan(plan: Plan, state: Mapping[str, Tensor]) -> Plan:
    """The plan without the axes of what a forward assigns, where the model has none of that size.

    Parameters
    ----------
    state
        The model's tensors by their first names, blocks that the plan drops apart.
    """
    written = plan.written
    if not written:
        return plan

    def fits(axis: Axis) -> bool:
        tensor, shape = state.get(axis.tensor), plan.shapes[axis.tensor]
        if axis.tensor not in written or isinstance(tensor, nn.Parameter):
            return True
        alike = tensor is not None and tensor.dim() == len(shape)
        return alike and tensor.shape[axis.dim] == shape[axis.dim]  # type: ignore[union-attr]

    keep = {axis: stay for axis, stay in plan.keep.items() if fits(axis)}
    sliced = {axis.tensor for axis in keep}
    shapes = {
        name: tuple(state[name].shape) if name in state and name in written else shape
        for name, shape in plan.shapes.items()
        if name not in written or name in sliced
    }
    return replace(plan, keep=keep, shapes=shapes)


def slice_tensor(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The positions that stay, dim by dim; dense, in the tensor's own memory format."""
    sliced = tensor.detach()
    for dim, stay in keep.items():
        sliced = sliced.index_select(dim, stay.to(sliced.device))
    if tensor.layout != torch.strided:
        return sliced
    # Outermost dim first.  The stride of a dim of size 1 means nothing: it is put last of its like.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1))
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return sliced.permute(order).contiguous().permute(back)


def make_up(
    model: nn.Module,
    state: Mapping[str, Tensor],
    cut: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """New magnitudes, by name, under which the kept weights stay what they were.

    Parameters
    ----------
    state, cut
        The model's tensors, and those of them that are cut, cut.
    kept
        By tensor and dim, the positions that are kept.

    A direction of length 0 gives weights that are not defined; its magnitude stays as it is.
    """
    for norm in find_weight_norms(model, state):
        axes = kept.get(norm.direction, {})
        if not axes or (norm.dim != -1 and set(axes) == {norm.dim}):
            continue  # each kept norm is the same as before
        along = {norm.dim: axes[norm.dim]} if norm.dim in axes else {}
        before = slice_tensor(norms_of(state[norm.direction], norm.dim), along)
        after = norms_of(cut[norm.direction], norm.dim)
        magnitude = cut.get(norm.magnitude, state[norm.magnitude]).detach()
        ratio = torch.where(before > 0, after / before, 1.0).reshape(magnitude.shape)
        yield norm.magnitude, (magnitude * ratio).to(magnitude)


def add_biases(model: nn.Module, biases: Mapping[str, int]) -> None:
    """Make the biases that are not there yet, in place.

    Parameters
    ----------
    biases
        Name of each bias, and the dim of its module's weight along which it goes.

    Raises
    ------
    ApplyError
        If a module has no such weight, or no place for a bias; nothing was changed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    made: list[tuple[nn.Module, nn.Parameter]] = []
    for name, dim in biases.items():
        prefix, _, own = name.rpartition(".")
        module = modules.get(prefix)
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or own not in module._parameters:
            raise ApplyError(
                f"there is no place for {name}",
                where=prefix,
                why="a bias is given to a layer that has a weight and may have a bias",
                fix="apply the plan to the model that it was made for",
            )
        if module._parameters[own] is None:
            zeros = torch.zeros(weight.shape[dim], dtype=weight.dtype, device=weight.device)
            made.append((module, nn.Parameter(zeros, requires_grad=weight.requires_grad)))
    for module, bias in made:
        module.bias = bias


@contextmanager
def with_biases(model: nn.Module, biases: Mapping[str, int]) -> Iterator[None]:
    """Within the context the model has the biases."""
    before = Snapshot(model)
    try:
        add_biases(model, biases)
        yield
    finally:
        before.restore()


def refuse_quantized(model: nn.Module) -> None:
    """:class:`~prunus.errors.ModelError` if weights are stored packed or as integers.

    PyTorch's own quantized layers keep packed parameters or quantized tensors; bitsandbytes,
    GPTQ and AWQ keep integers in the place of weights.
    """
    for path, module in model.named_modules():
        if _is_quantized(module):
            raise ModelError(
                "the model is quantized",
                where=path or type(module).__name__,
                why=f"{type(module).__name__} stores its weights packed or as integers, of which "
                "nothing can be scored or verified",
                fix="load the model in floating point, prune it, and quantize what is left",
            )


def _is_quantized(module: nn.Module) -> bool:
    stores = (vars(module), module._modules, module._parameters, module._buffers)
    if any(name in store for store in stores for name in ("_packed_params", "qweight")):
        return True
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    integers = any(isinstance(one, nn.Parameter) and not is_continuous(one) for one in held)
    return integers or any(tensor.is_quantized for tensor in held)


def is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
