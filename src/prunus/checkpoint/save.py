"""Write a model, pruned or not, into one file."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from prunus.checkpoint.container import write_container
from prunus.checkpoint.document import Document
from prunus.errors import FormatError, PlanError, checks_options, first_names
from prunus.files import replace_file
from prunus.graph.plan_records import check_kind
from prunus.graph.plans import Plan
from prunus.surgeon import applied_plan
from prunus.surgeon.reach import value_of
from prunus.surgeon.restore import Tensors, check_cut, collect
from prunus.tracer.wrappers import unwraps


@checks_options
@unwraps
def save(model: nn.Module, path: str | os.PathLike[str], plan: Plan | None = None) -> None:
    """Write parameters, buffers, tensor attributes and the plan into one safetensors file.

    Non-persistent buffers and plain tensor attributes are among them, unless they are sparse or
    the traced forward writes them; tied tensors are written once.  The file is the old one or the
    new one, never half of it; the same model makes the same bytes.  :func:`prunus.load` reads it.

    Parameters
    ----------
    plan
        What the model was cut by, from the original on; compose several with
        :meth:`Plan.then <prunus.Plan.then>`.  Without it, what was applied to this very object in
        this process; a copy of it is another object.

    Raises
    ------
    PlanError
        If the model is not what the plan leaves, or the plan sets what no plan may.
    FormatError
        If a tensor has no values (meta) or a type that safetensors doesn't know, or if a module
        keeps extra state that only a pickle could hold.
    FileError
        If the system refuses to write.
    """
    plan = applied_plan(model) if plan is None else plan
    _refuse_extra_state(model)
    tensors = collect(model, () if plan is None else plan.written)
    if plan is not None:
        _check_plan(plan, model, tensors)
    document = Document(
        plan,
        tensors.aliases,
        {
            name: kind
            for name, kind in tensors.kinds.items()
            if kind != "parameter" and (name in tensors.values or name in tensors.aliases)
        },
        tensors.frozen,
        frozenset(name for name, tensor in tensors.values.items() if has_channels_last(tensor)),
    )
    metadata = document.to_metadata()
    replace_file(path, lambda draft: write_container(draft, tensors.values, metadata))


def has_channels_last(tensor: Tensor) -> bool:
    """Whether the memory is laid out that way and no other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.layout != torch.strided or tensor.dim() not in formats or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=formats[tensor.dim()])


def _check_plan(plan: Plan, model: nn.Module, tensors: Tensors) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    wrong = check_cut(tensors, plan)
    for edit in plan.edits:
        where = f"{edit.module}.{edit.attribute}".lstrip(".")
        check_kind(where, edit.attribute, edit.before, edit.after)
        value = value_of(modules.get(edit.module), edit.attribute)
        if type(value) is not type(edit.after) or value != edit.after:
            wrong.append(where)
    if wrong:
        raise PlanError(
            "the model is not what the plan leaves",
            where=first_names(wrong),
            why="the plan was not applied, or the model was changed since",
            fix="give the plan that leads from the original to this model: plan=first.then(second)",
        )


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise FormatError(
                "a module keeps extra state, which can't be saved",
                where=name or type(module).__name__,
                why=f"{type(module).__name__}.get_extra_state may return anything, and only a "
                "pickle could hold that",
                fix="keep the state in buffers",
            )
