"""Another way into a model than its forward: a method of its, or a function that calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn

from prunus.errors import ModelError, PlanError
from prunus.graph.plan_json import Entry, Traced

ForwardFn = str | Callable[..., Any]
"""The name of a method of the model, or a function called as ``forward_fn(model, *args)``."""


class _Entry:
    """Stands in for the forward of the model that holds it; a copied model gets its own."""

    __slots__ = ("forward_fn", "model", "own")

    def __init__(self, model: nn.Module, forward_fn: ForwardFn, own: Any) -> None:
        self.model = model
        self.forward_fn = forward_fn
        self.own = own  # a forward that was patched onto the model before; None for its class's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _without_entry(self.model):  # so that the function may call the model itself
            if self.own is not None:
                vars(self.model)["forward"] = self.own
            if isinstance(self.forward_fn, str):
                return getattr(self.model, self.forward_fn)(*args, **kwargs)
            return self.forward_fn(self.model, *args, **kwargs)


@contextmanager
def entered_by(model: nn.Module, forward_fn: ForwardFn | None) -> Iterator[None]:
    """Within the context calling the model, or a copy of it, means calling ``forward_fn``.

    Raises
    ------
    ModelError
        If it is the name of a method that the model doesn't have.
    """
    if forward_fn is None:
        yield
        return
    if isinstance(forward_fn, str) and not callable(getattr(model, forward_fn, None)):
        raise ModelError(
            f"the model has no method {forward_fn!r}",
            where="forward_fn=",
            fix="give the name of a method, or a function that is called with the model",
        )
    own = vars(model).get("forward")
    own = own.own if isinstance(own, _Entry) else own
    with _without_entry(model):
        vars(model)["forward"] = _Entry(model, forward_fn, own)
        yield


@contextmanager
def own_forward_seen(model: nn.Module) -> Iterator[list[bool]]:
    """A list that is not empty once the model's own forward has run; at once where that is called.

    What :func:`entered_by` puts in its place may call it, or do without.
    """
    entry = vars(model).get("forward")
    if not isinstance(entry, _Entry):
        yield [True]
        return
    seen: list[bool] = []
    before = entry.own
    own = MethodType(type(model).forward, model) if before is None else before

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        return own(*args, **kwargs)

    entry.own = forward
    try:
        yield seen
    finally:
        entry.own = before


@contextmanager
def _without_entry(model: nn.Module) -> Iterator[None]:
    """Within the context the model's own forward, or another, can be called or put in place."""
    own = vars(model)
    before = own.pop("forward", None)
    try:
        yield
    finally:
        own.pop("forward", None)
        if before is not None:
            own["forward"] = before


def entry_of(model: nn.Module) -> ForwardFn | None:
    """What stands in for the model's forward at present."""
    found = vars(model).get("forward")
    return found.forward_fn if isinstance(found, _Entry) else None


def _called(entry: Entry) -> str:
    return f"model.{entry.method}(...)" if entry.method else f"{entry.function}(model, ...)"


def describe_entry(forward_fn: ForwardFn) -> dict[str, str]:
    """The entry as plain data, for a plan.

    >>> describe_entry("encode"), describe_entry(describe_entry)
    ({'method': 'encode'}, {'function': 'describe_entry'})
    """
    if isinstance(forward_fn, str):
        return {"method": forward_fn}
    return {"function": str(getattr(forward_fn, "__qualname__", type(forward_fn).__qualname__))}


@contextmanager
def entered_as_traced(
    model: nn.Module, traced: Traced | None, forward_fn: ForwardFn | None
) -> Iterator[None]:
    """Within the context calling the model means calling ``forward_fn``, which the caller gives.

    Raises
    ------
    PlanError
        If the plan was made with one and none is given.  What is called is never taken from the
        plan: it may be a stranger's file, and a model has methods that write files.
    """
    described = None if traced is None else traced.forward_fn
    if described is not None and forward_fn is None and entry_of(model) is None:
        function = repr(described.method) if described.method else "the same function"
        raise PlanError(
            f"the plan was made by calling {_called(described)}",
            why="a plan is data: what is run in place of the forward is taken from the caller only",
            fix=f"give forward_fn={function} (to apply it without running the model: check=False)",
        )
    with entered_by(model, forward_fn):
        yield
