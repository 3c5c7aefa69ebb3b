"""Save a model, pruned or not, in one file, and read it back.

The file has the tensors, what they were in the model, and the plan.  Reading builds the original,
cheaply if possible, and makes it the pruned one.
"""

# No postponed annotations in this file: msgspec would compile them at the first file that is read.

import gc
import os
import types
import warnings
from collections.abc import Callable, Iterator, Set
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prunus.checkpoint.container import (
    Container,
    damaged,
    decode,
    open_container,
    write_container,
)
from prunus.errors import (
    FormatError,
    ModelError,
    PlanError,
    checks_options,
    first_names,
    found_in,
)
from prunus.files import replace_file
from prunus.graph.plan_records import check_kind
from prunus.graph.plans import Plan
from prunus.surgeon import applied_plan, restore
from prunus.surgeon.reach import value_of
from prunus.surgeon.restore import Kind, Tensors, check_cut, collect
from prunus.tracer.precision import LOCK, same_draws
from prunus.tracer.wrappers import unwraps

Model = TypeVar("Model", bound=nn.Module)

SCHEMA = 2
"""Of the file; its plan is of the second form, version 1 is read as well."""

READABLE = (1, 2)

_KINDS: tuple[Kind, ...] = ("buffer", "hidden", "attribute")
"""Those that are listed; what is in no list is a parameter."""

_POSITION = 64
"""Bytes that a position takes: a number, its places in a list and a tuple, and some room."""

_POSITIONS = 8 << 20
"""Bytes that all positions of a plan may take, however small the file."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Version(msgspec.Struct, frozen=True):
    schema: Any


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the tensors of a file were in the model, by their names.

    Attributes
    ----------
    aliases
        Other name → first name, of tied tensors.
    buffer, hidden, attribute
        Buffers, buffers that no ``state_dict`` has, and tensor attributes.
    frozen
        Parameters that don't require gradients.
    channels_last
        Tensors whose memory is laid out with the channels last.
    """

    schema: int
    aliases: dict[str, str]
    buffer: tuple[str, ...]
    hidden: tuple[str, ...]
    attribute: tuple[str, ...]
    frozen: tuple[str, ...]
    channels_last: tuple[str, ...]


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
    of_kind: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name in sorted(tensors.values.keys() | tensors.aliases.keys()):
        of_kind.get(tensors.kinds[name], []).append(name)
    document = {
        "schema": SCHEMA,
        "aliases": tensors.aliases,
        **of_kind,
        "frozen": sorted(tensors.frozen),
        "channels_last": sorted(n for n, t in tensors.values.items() if has_channels_last(t)),
    }
    metadata = {"prunus": msgspec.json.encode(document, order="sorted").decode()}
    if plan is not None:
        metadata["plan"] = plan.to_json()
    replace_file(path, lambda draft: write_container(draft, tensors.values, metadata))


def has_channels_last(tensor: Tensor) -> bool:
    """Whether the memory is laid out that way and no other."""
    laid_out = _CHANNELS_LAST.get(tensor.dim())
    if tensor.layout != torch.strided or laid_out is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=laid_out)


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


@checks_options
def load(path: str | os.PathLike[str], build: Callable[[], Model]) -> Model:
    """Read a file of :func:`prunus.save`; nothing in it is run or unpickled.

    The model comes on the CPU, in the mode (train or eval) that ``build`` leaves it in.

    Parameters
    ----------
    build
        Makes the model as it was before it was pruned; what weights it has doesn't matter.  It is
        called on the meta device first, which costs no memory and no time, and once more on the
        CPU if something comes out that has no values and is not in the file.

    Raises
    ------
    FileError
        If the file can't be read.
    FormatError
        If it was not written by :func:`prunus.save`, is truncated or was changed, was written by
        another version, or does not fit what ``build`` makes.
    PlanError
        If the file's plan is for another model than ``build`` makes.

    Examples
    --------
    >>> import prunus, tempfile
    >>> small = nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prunus.save(small, folder + "/small.safetensors")
    ...     same = prunus.load(folder + "/small.safetensors", build=lambda: nn.Linear(3, 2))
    >>> torch.equal(small.weight, same.weight)
    True
    """
    tensors, plan = read_file(path)
    model = _on_meta(build, tensors, plan, str(path))
    if model is None:
        model = _built(build)
        with found_in(str(path)):
            restore(model, tensors, plan)
        left = next(without_values(model), None)
        if left is not None:
            raise ModelError(
                "the model has a tensor without values, and the file doesn't have it",
                where=left,
                why="build= puts it on the meta device",
                fix="let build= make it on the CPU",
            )
    return model


def read_file(path: str | os.PathLike[str]) -> tuple[Tensors, Plan | None]:
    """Tensors and plan of a file, checked as far as they can be without the model."""
    with open_container(path) as container:
        text = _checked_schema(container)
        values = container.read()
        listed = _read_listed(container.path, text, values.keys())
        plan = _read_plan(container)
    kinds: dict[str, Kind] = dict.fromkeys((*values, *listed.aliases), "parameter")
    for kind in _KINDS:
        kinds.update(dict.fromkeys(getattr(listed, kind), kind))
    for name in listed.channels_last:
        laid_out = _CHANNELS_LAST.get(values[name].dim()) if name in values else None
        if laid_out is not None:
            values[name] = values[name].contiguous(memory_format=laid_out)
    return Tensors(values, listed.aliases, kinds, frozenset(listed.frozen)), plan


def _checked_schema(container: Container) -> str:
    """The document of a file that this version can read, as text."""
    path = container.path
    text = container.metadata.get("prunus")
    if text is None:
        raise FormatError(
            "this file was not written by prunus.save",
            where=path,
            why="it is a safetensors file without a document of Prunus",
            fix="build the model and load it with safetensors.torch.load_model",
        )
    found = decode(text, _Version, path).schema
    if type(found) is not int or found not in READABLE:
        raise FormatError(
            f"the file has schema version {found!r}",
            where=path,
            why=f"this Prunus reads the versions {', '.join(map(str, READABLE))}",
            fix="install the Prunus that wrote it",
        )
    return text


def _read_listed(path: str, text: str, names: Set[str]) -> _Listed:
    """The checked lists of a file with tensors of these names."""
    found = decode(text, _Listed, path)
    if not set(found.aliases.values()) <= names or names & set(found.aliases):
        raise damaged(path, "its aliases speak of tensors that it does not have")
    known = names | set(found.aliases)
    for field in (*_KINDS, "frozen", "channels_last"):
        if not set(getattr(found, field)) <= known:
            raise damaged(path, f"its list {field!r} speaks of tensors that it does not have")
    return found


def _read_plan(container: Container) -> Plan | None:
    text = container.metadata.get("plan")
    if text is None:
        return None
    with found_in(container.path):
        return Plan.from_json(text, limit=max(container.size, _POSITIONS) // _POSITION)


def _on_meta(
    build: Callable[[], Model], tensors: Tensors, plan: Plan | None, path: str
) -> Model | None:
    """The finished model, or None if it takes one that was built on the CPU."""
    try:
        with LOCK, torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _built(build)
    except Exception:  # whatever a constructor may do with values: on the CPU it has them
        return None
    plain = (nn.Parameter, nn.Buffer, Tensor)
    if any(type(t) not in plain for t in (*model.parameters(), *model.buffers())):
        return None  # its class may need more than data
    with found_in(path):
        restore(model, tensors, plan)
    return model if next(without_values(model), None) is None else None


def _built(build: Callable[[], Model]) -> Model:
    with same_draws():
        model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"build= returned a {type(model).__name__}",
            why="a model is a torch.nn.Module",
            fix="give a function without arguments that returns the original model",
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                "build= returns a model of lazy modules, which have no shapes yet",
                where=name,
                why="their shapes come with the first forward",
                fix="run the model once in build=, on an example input, before it is returned",
            )
    return model


def without_values(model: nn.Module) -> Iterator[str]:
    """Paths of all that lies on the meta device, in whatever attribute, container or closure."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, (Tensor, torch.device)):
            if torch.device("meta") == (value.device if isinstance(value, Tensor) else value):
                yield path
        elif id(value) not in seen:
            seen.add(id(value))
            stack += [(f"{path}.{name}".strip("."), part) for name, part in _parts(value)]


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a value holds on to, by name; modules of Python and classes are nobody's own."""
    if isinstance(value, (str, bytes, int, float, type, types.ModuleType)):
        return []
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, types.FunctionType):
        return [("closure", value.__closure__), ("defaults", value.__defaults__)]
    own = getattr(value, "__dict__", None)
    held = _parts(own) if isinstance(own, dict) and own is not value else []
    return held + [("", part) for part in gc.get_referents(value) if part is not own]
