"""Other ways through a module than the forward that was traced: they have to agree with it too.

Exporters call another forward of a class (``forward_split``), and deployment folds a block into
fewer layers (``reparameterize``, ``fuse``, ``switch_to_deploy``).  Such a method may read integers
that the traced forward does not.  On copies of single modules, with the inputs that they get in
the model, both ways are run: what agrees in the whole model has to agree in the smaller one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.graph.axis import Mask
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plan_records import Edit
from prunus.graph.plans import Plan
from prunus.surgeon.apply import cut_own
from prunus.surgeon.attributes import Unread, find_unread, head_counts, unexplained
from prunus.surgeon.reach import read_attribute, write_attribute
from prunus.tracer.copies import duplicate, names_in
from prunus.tracer.forward_fn import entered_by
from prunus.tracer.inputs import rebuild_inputs
from prunus.tracer.outputs import answer_of
from prunus.tracer.quiet import quiet
from prunus.tracer.sources import find_line
from prunus.tracer.trace import quiet_run
from prunus.verifier.case import Case
from prunus.verifier.permutation import relative_error

AGREES = 1e-4
"""Largest relative difference between two ways through a module that compute the same."""

MOST_TRIALS = 64
"""Values that are tried for the integers of one module."""

_FOLDS = ("reparam", "deploy", "fuse")
"""Parts of the names of methods that make a module into an equal one of fewer layers."""


@dataclass(frozen=True)
class _Call:
    """What a module was called with, and what it returned."""

    args: Any
    kwargs: Any
    answer: Mapping[str, Tensor]


def follow_other_ways(plan: Plan, graph: CouplingGraph, model: nn.Module, kept: Mask) -> Plan:
    """The plan with the integers that only other ways read, as far as a trial shows their value.

    ``origin["stale"]`` lists integers that equal a removed width and that nothing was found for.

    Parameters
    ----------
    plan
        A plan for the model, blocks apart; its positions and edits are complete but for these.
    graph, model, kept
        What it was made of.
    """
    found = find_unread(model, graph, kept, plan.edits)
    edits = {(edit.module, edit.attribute): edit for edit in head_counts(found)}
    asked = _by_module(model, found)
    if asked and all(tensor.device.type != "meta" for tensor in model.parameters()):
        tried = _try_edits(replace(plan, edits=(*plan.edits, *edits.values())), graph, model, asked)
        edits |= {(edit.module, edit.attribute): edit for edit in tried}
    stale = unexplained(found, edits)
    if not edits and not stale:
        return plan
    origin = {**plan.origin, "stale": list(stale)} if stale else plan.origin
    return replace(plan, edits=(*plan.edits, *edits.values()), origin=origin)


def stale_integers(case: Case) -> tuple[str, ...]:
    """Integers that the cut may have left stale, and other ways that no longer agree, in words."""
    found = find_unread(case.original, case.graph, case.kept, case.plan.edits)
    asked = _by_module(case.original, find_unread(case.original, case.graph, case.kept, ()))
    pairs = _pairs(case.original, case.pruned, asked, case.args, case.kwargs) if asked else ()
    wrong = tuple(
        f"{path}.{way} does not compute what the forward does".lstrip(".")
        for path, _, ways in pairs
        for way in ways
    )
    return (*unexplained(found, {}), *wrong)


def _by_module(model: nn.Module, found: Iterable[Unread]) -> dict[str, list[Unread]]:
    """Those that another way of their module mentions, by module, children before parents."""
    modules = dict(model.named_modules())
    asked: dict[str, list[Unread]] = {}
    for one in found:
        module = modules[one.module]
        name = one.attribute.partition("[")[0]
        if any(name in _mentioned(type(module), way) for way in ways_of(module)):
            asked.setdefault(one.module, []).append(one)
    return dict(reversed(asked.items()))


def ways_of(module: nn.Module) -> list[str]:
    """Methods of a module's class that may compute what its forward does.

    Other forwards of the same signature, and methods without arguments that fold the module; what
    folds is called from outside, and has a public name (``_make_fuse_layers`` builds a module).
    """
    kind = type(module)
    taken = _signature(kind.forward)
    own = {name: inspect.getattr_static(kind, name) for name in dir(kind) if name[:2] != "__"}
    return [
        name
        for name, function in own.items()
        if isinstance(function, FunctionType)
        and getattr(nn.Module, name, None) is not function
        and _is_way(name, _signature(function), taken)
    ]


def _is_way(name: str, signature: list[bool] | None, taken: list[bool] | None) -> bool:
    if "forward" in name:
        return name != "forward" and signature == taken
    folds = name[0] != "_" and any(part in name.lower() for part in _FOLDS)
    return folds and not any(signature or ())


def _signature(function: Any) -> list[bool] | None:
    """Of every parameter but the first, whether it has to be given; None where nobody can say."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.default is p.empty and p.kind not in variable for p in parameters]


def _mentioned(kind: type, way: str) -> set[str]:
    """Attributes that a method names, and the methods of its class that it calls."""
    names: set[str] = set()
    pending = [way]
    while pending:
        function = inspect.getattr_static(kind, pending.pop(), None)
        function = getattr(function, "__func__", getattr(function, "fget", function))
        if isinstance(function, FunctionType):
            fresh = set(names_in(inspect.unwrap(function).__code__)) - names
            names |= fresh
            pending += [name for name in fresh if hasattr(kind, name)]
    return names


def _try_edits(
    plan: Plan, graph: CouplingGraph, model: nn.Module, asked: Mapping[str, Sequence[Unread]]
) -> list[Edit]:
    """The values with which the other ways through the cut modules agree with the forward."""
    spec = graph.traced.get("inputs")
    if spec is None:
        return []
    args, kwargs = rebuild_inputs(spec, model)
    with entered_by(model, graph.forward_fn):
        original = duplicate(model, share=True)
        pruned = cut_own(plan, duplicate(model, share=True))
    edits = []
    for path, (module, call), ways in _pairs(original, pruned, asked, args, kwargs):
        for way in ways:
            for one, value in _values(module, call, way, asked[path]):
                if value != one.before:
                    write_attribute(module, one.attribute, value)
                    edits.append(Edit(one.module, one.attribute, one.before, value))
    return edits


def _pairs(
    original: nn.Module,
    pruned: nn.Module,
    asked: Mapping[str, Sequence[Unread]],
    args: Any,
    kwargs: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[nn.Module, _Call], list[str]]]:
    """Of each module that is asked for: the cut one with its call, and the ways that went wrong.

    Those disagree with the forward in the cut model, and agree with it at full size.
    """
    calls = _record_calls(pruned, asked, args, kwargs)
    before: dict[str, _Call] | None = None
    for path in filter(calls.__contains__, asked):  # others did not run
        cut, whole = pruned.get_submodule(path), original.get_submodule(path)
        wrong = _failing(cut, calls[path], ways_of(whole))
        if wrong and before is None:
            before = _record_calls(original, asked, args, kwargs)
        if wrong and before and path in before:
            failing = _failing(whole, before[path], wrong)
            yield path, (cut, calls[path]), [way for way in wrong if way not in failing]


def _failing(module: nn.Module, call: _Call, ways: Iterable[str]) -> list[str]:
    return [way for way in ways if not _agrees(module, call, way)]


def _record_calls(
    model: nn.Module, paths: Iterable[str], args: Any, kwargs: Mapping[str, Any]
) -> dict[str, _Call]:
    """The first call of each module in one forward of the model; empty where that fails."""
    calls: dict[str, _Call] = {}
    handles: list[Any] = []
    given: dict[str, Any] = {}

    def attach(path: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.setdefault(path, _copied((args, kwargs)))

        def leave(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if path not in calls:
                answer = {name: t.clone() for name, t in answer_of(result).items()}
                calls[path] = _Call(given[path][0], given[path][1], answer)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    try:
        for path in paths:
            attach(path, model.get_submodule(path))
        with quiet_run(model):
            model(*_copied(args), **_copied(dict(kwargs)))
    except Exception:  # the user's forward may raise anything; the verifier will say so
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(values: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, values)


def _agrees(
    module: nn.Module, call: _Call, way: str, values: Mapping[str, int] | None = None
) -> bool:
    """Whether a copy of the module, with other integers in it, answers the same that way."""
    folds = "forward" not in way  # it changes the module's tensors, or returns a folded one
    try:
        trial = duplicate(module, share=not folds)
        for attribute, value in (values or {}).items():
            write_attribute(trial, attribute, value)
        with quiet_run(trial):
            run = getattr(trial, way)
            if folds:
                made = run()
                run = made if isinstance(made, nn.Module) else trial
            answer = answer_of(run(*_copied(call.args), **_copied(call.kwargs)))
    except Exception:  # it may raise anything with a wrong integer
        return False
    return answer.keys() == call.answer.keys() and relative_error(call.answer, answer) <= AGREES


def _values(
    module: nn.Module, call: _Call, way: str, asked: Sequence[Unread]
) -> list[tuple[Unread, int]]:
    """Of the integers that a way reads, values with which it agrees; none if there are none.

    An integer with which the way agrees as it is keeps its value.
    """
    mentioned = _mentioned(type(module), way)
    read = [one for one in asked if one.attribute.partition("[")[0] in mentioned]
    present = {one.attribute: read_attribute(module, one.attribute) for one in read}
    for chosen in islice(product(*((*one.after, one.before) for one in read)), MOST_TRIALS):
        values = dict(zip(present, chosen, strict=True))
        ways = () if values == present else (way, "forward")  # as it is, the way went wrong
        if ways and all(_agrees(module, call, one, values) for one in ways):
            values = _nearest(module, call, way, values, present)
            return list(zip(read, values.values(), strict=True))
    return []


def _nearest(
    module: nn.Module, call: _Call, way: str, values: dict[str, int], present: Mapping[str, int]
) -> dict[str, int]:
    """The values, with what the module has now wherever the way agrees with that as well."""
    for name in values if len(values) > 1 else ():
        trial = {**values, name: present[name]}
        if trial != values and _agrees(module, call, way, trial):
            values = trial
    return values


def breaks_in_training(case: Case) -> str:
    """What the cut model raises in training mode where the original raises nothing.

    Asked only of models with parameters that the traced forward did not read; empty otherwise.
    """
    unread = case.graph.traced.get("unread", ())
    if not unread or _error_in_training(case, case.original) is not None:
        return ""
    error = _error_in_training(case, case.pruned)
    if error is None:
        return ""
    return (
        f"in training mode the pruned model raises {type(error).__name__} at {find_line(error)}: "
        f"{error}; its eval mode never reads {unread[0]}"
    )


def _error_in_training(case: Case, model: nn.Module) -> Exception | None:
    copied = duplicate(model)
    copied.train()
    try:
        with quiet():
            copied(*case.args, **case.kwargs)
    except Exception as error:  # a forward may raise anything
        return error
    return None
