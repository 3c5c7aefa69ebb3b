"""What a model must be to be traced: the module inside of a wrapper, or refused by name."""

from __future__ import annotations

import gc
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from prunus.errors import ModelError, TraceError, first_names
from prunus.graph.program import modules_in

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
    modules = modules_in(model)
    compiled = [name for name, module in modules if _is_compiled(module)]
    if compiled:
        raise TraceError(
            "the model is compiled" if compiled[0] == "" else "a part of the model is compiled",
            where=first_names([name for name in compiled if name]),
            why="torch.compile runs other code than the forward, made for the present shapes",
            fix="prune it before it is compiled (what torch.compile(module) wraps is _orig_mod)",
        )
    held = (*_held(modules, "_parameters"), *_held(modules, "_buffers"))
    lazy = [name for name, tensor in held if is_lazy(tensor)]
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
    modules = modules_in(model)
    for path, module in modules:
        sharded = next((kind for kind in _kinds(module) if kind in _SHARDED), None)
        if sharded is None and any("DTensor" in _kinds(one) for one in module._parameters.values()):
            sharded = "DTensor"
        if sharded is not None:
            raise ModelError(
                f"the model is sharded ({sharded})",
                where=path or type(module).__name__,
                why="each process has only a part of every tensor",
                fix="prune before fully_shard: cut the plain model, then shard it",
            )
    frozen = _made_in_inference_mode(modules)
    if frozen:
        raise ModelError(
            "the model was made in torch.inference_mode",
            where=first_names(frozen),
            why="such parameters can be neither changed nor trained outside of it",
            fix="build or load it outside of torch.inference_mode; torch.no_grad() does no harm",
        )
    return model


def _kinds(module: Any) -> list[str]:
    """Names of PyTorch's own classes that something is an instance of."""
    return [kind.__name__ for kind in type(module).__mro__ if kind.__module__[:6] == "torch."]


def _made_in_inference_mode(modules: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Names of such parameters; those of ScriptModules are new at every access."""
    plain = [pair for pair in modules if not isinstance(pair[1], torch.jit.ScriptModule)]
    parameters = _held(plain, "_parameters")
    return [name for name, one in parameters if not is_lazy(one) and one.is_inference()]


def _held(modules: Sequence[tuple[str, nn.Module]], kind: str) -> Iterator[tuple[str, Any]]:
    """The parameters or buffers that modules hold themselves, by name."""
    for path, module in modules:
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


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
