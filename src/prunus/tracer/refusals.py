"""Models that can't be traced at all, told before anything runs."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prunus.errors import ModelError, TraceError, first_names
from prunus.graph.program import modules_in

_NAMED = 3

NEWEST_TESTED = (2, 14)
"""The newest release of PyTorch that the tests ran on."""


def warn_untested(version: str = str(torch.__version__)) -> None:
    """Warn where PyTorch is newer than what was tested: its operators may differ.

    >>> warn_untested("2.14.1+cpu")
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"PyTorch {version} is newer than {newest}, the newest release that Prunus was tested "
            "with; unknown operators are pinned and listed in the plan",
            stacklevel=3,
        )


def refuse_untraceable(model: nn.Module) -> None:
    """Raise for a model that is no Python module, or whose tensors have no shape yet.

    Raises
    ------
    ModelError, TraceError
        Saying what to do.
    """
    if not issubclass(type(model), nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}",
            where="model=",
            why="layers are found and changed in a torch.nn.Module",
            fix="give the module itself; a function that calls it goes to forward_fn=",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a ScriptModule",
            why="its code is compiled, and its layers can be neither followed nor changed",
            fix="prune the Python model, and script or trace what comes out",
        )
    compiled = [name for name, module in modules_in(model) if _is_compiled(module)]
    if compiled:
        raise TraceError(
            "the model is compiled" if compiled[0] == "" else "a part of the model is compiled",
            where=", ".join(filter(None, compiled[:_NAMED])),
            why="torch.compile runs other code than the forward, made for the present shapes",
            fix="prune the model as it was before torch.compile (model._orig_mod), then compile it",
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise TraceError(
            "the model has lazy modules that were never run",
            where=first_names(lazy),
            why="their parameters have no shape before the first forward",
            fix="run the model once on real inputs: model(*args)",
        )


def _is_compiled(module: nn.Module) -> bool:
    wrapped = type(module).__module__ == "torch._dynamo.eval_frame"
    return wrapped or vars(module).get("_compiled_call_impl") is not None


def refuse_nested(operator: str, module: str, source: str) -> None:
    """Raise for an operator that made a nested tensor."""
    raise TraceError(
        f"{operator} makes a nested tensor",
        where=" ".join(filter(None, (module, source))),
        why="it has no shape whose dims could be followed",
        fix="pad the sequences to one length, or trace a part of the model that has none",
    )


def scripted(model: nn.Module) -> frozenset[str]:
    """Paths of the ScriptModules in a model, those inside of them included."""
    return frozenset(
        name for name, module in modules_in(model) if isinstance(module, torch.jit.ScriptModule)
    )
