"""Read a model back: build the original, cheaply if possible, and make it the pruned one."""

from __future__ import annotations

import gc
import os
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prunus.checkpoint.container import open_container
from prunus.checkpoint.document import check_schema, read_document
from prunus.errors import ModelError, checks_options, found_in
from prunus.graph.plans import Plan
from prunus.surgeon import restore
from prunus.surgeon.restore import Kind, Tensors
from prunus.tracer.precision import alone, same_draws

Model = TypeVar("Model", bound=nn.Module)


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
        If it is no file of :func:`prunus.save`, is truncated or was changed, was written by
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
        raw = check_schema(container)
        values = container.read()
        document = read_document(container, raw, values.keys())
    kinds: dict[str, Kind] = dict.fromkeys((*values, *document.aliases), "parameter")
    kinds.update(document.kinds)
    for name in document.channels_last & values.keys():
        values[name] = _channels_last(values[name])
    return Tensors(values, document.aliases, kinds, document.frozen), document.plan


def _channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.dim() in formats:
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    return tensor


def _on_meta(
    build: Callable[[], Model], tensors: Tensors, plan: Plan | None, path: str
) -> Model | None:
    """The finished model, or None if it takes one that was built on the CPU."""
    try:
        with alone(), torch.device("meta"), warnings.catch_warnings():
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
