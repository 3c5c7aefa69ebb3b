"""Wrappers around a model: the module inside is traced and cut, or they are refused by name."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from prunus.errors import ModelError
from prunus.graph.program import modules_in

P = ParamSpec("P")
Result = TypeVar("Result")

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: Any) -> Any:
    """The module inside of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    Raises
    ------
    ModelError
        If its parameters are sharded, as a shard does not have the positions that a plan speaks of,
        or if they were made in ``torch.inference_mode``, as PyTorch lets nobody change them then.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return unwrapped(model.module)
    if "OptimizedModule" in _kinds(model):
        return unwrapped(model._orig_mod)
    if not isinstance(model, nn.Module):
        return model
    for path, module in modules_in(model):
        sharded = next((kind for kind in _kinds(module) if kind in _SHARDED), None)
        if sharded is not None:
            raise ModelError(
                f"the model is sharded ({sharded})",
                where=path or type(module).__name__,
                why="each process has only a part of every tensor",
                fix="prune the plain model first, then shard it",
            )
    frozen = _made_in_inference_mode(model)
    if frozen:
        raise ModelError(
            "the model was made in torch.inference_mode",
            where=", ".join(frozen[:3]),
            why="such parameters can be neither changed nor trained outside of it",
            fix="build or load it outside of torch.inference_mode; torch.no_grad() does no harm",
        )
    return model


def _kinds(module: Any) -> list[str]:
    """Names of PyTorch's own classes that something is an instance of."""
    return [kind.__name__ for kind in type(module).__mro__ if kind.__module__[:6] == "torch."]


def _made_in_inference_mode(model: nn.Module) -> list[str]:
    """Names of such parameters; those of ScriptModules are not asked, which makes them anew."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in modules_in(model)
        if not isinstance(module, torch.jit.ScriptModule)
        for name, parameter in module.named_parameters(recurse=False)
        if not _is_unmade(parameter) and parameter.is_inference()
    ]


def _is_unmade(parameter: object) -> bool:
    return isinstance(parameter, UninitializedParameter)


def unwraps(verb: Callable[P, Result]) -> Callable[P, Result]:
    """Let a function with an argument ``model`` get the module inside of wrappers.

    It runs outside of ``torch.inference_mode``: tensors that are made in there can't be trained,
    and operators are not taken apart into those that are followed.
    """
    place = list(inspect.signature(verb).parameters).index("model")

    @wraps(verb)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Result:
        given: list[Any] = list(args)
        if len(given) > place and issubclass(type(given[place]), nn.Module):
            given[place] = unwrapped(given[place])
        elif issubclass(type(kwargs.get("model")), nn.Module):
            kwargs["model"] = unwrapped(kwargs["model"])
        if not torch.is_inference_mode_enabled():
            return verb(*given, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return verb(*given, **kwargs)

    return inside


def warn_of_wrappers(model: nn.Module) -> None:
    """Warn where a ``DistributedDataParallel`` holds parameters of a model that was just cut.

    Its buckets are made for the gradients that there were.  Nothing leads from a module to its
    wrapper, so that all objects are looked through; but there can be one only in a process group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own = {id(parameter) for parameter in model.parameters()}
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    if any(not own.isdisjoint(map(id, one.module.parameters())) for one in wrappers):
        warnings.warn(
            "a DistributedDataParallel holds parameters that were cut, and fails at its next "
            "steps: wrap the model anew, DistributedDataParallel(model)",
            stacklevel=2,
        )
