"""The rule registry: one function per kind of operator, keyed by ATen overload.

Kept outside ``rules/`` so that importing one rule imports no other.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from prunus.errors import RuleError
from prunus.graph.axis import Label
from prunus.graph.expressions import Expression
from prunus.graph.groups import Pin
from prunus.graph.program import Effect, Labels, Path, Place
from prunus.tracer.labels import Algebra, Atoms
from prunus.tracer.provenance import Provenance, plain


class Given:
    """The arguments of one torch function as the forward wrote them."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.name = getattr(func, "__name__", "")
        self._args, self._kwargs = args, kwargs

    def sizes(self, count: int) -> list[Any] | None:
        """The ``count`` sizes as they were written; -1 where nothing was written for a dim."""
        bound = bool(self._args) and isinstance(self._args[0], Tensor)
        args = self._args[1:] if bound else self._args
        if self.name == "unflatten" and len(args) == 2:
            at = args[0] + (count - len(args[1]) + 1 if args[0] < 0 else 0)
            return [-1] * at + list(args[1]) + [-1] * (count - at - len(args[1]))
        written = (args, *args, *self._kwargs.values())
        return next((list(one) for one in written if _are_sizes(one, count)), None)

    def argument(self, position: int, name: str) -> Any:
        """An argument by its position or name; None if it was left out."""
        return self._args[position] if position < len(self._args) else self._kwargs.get(name)

    def other(self) -> Tensor | None:
        """The second tensor argument, as in ``x.view_as(other)``."""
        tensors = [v for v in (*self._args, *self._kwargs.values()) if isinstance(v, Tensor)]
        return tensors[1] if len(tensors) > 1 else None

    def expression(self, value: int) -> Expression:
        """The expression of an argument of that value; the value itself if none has one."""
        for found in integers_in((self._args, tuple(self._kwargs.values()))):
            if isinstance(found, Provenance) and plain(found) == value:
                return found.expression
        return value


def _are_sizes(value: Any, count: int) -> bool:
    listed = isinstance(value, (tuple, list)) and len(value) == count
    return listed and all(isinstance(item, (int, np.integer)) for item in value)


def integers_in(structure: Any) -> Iterator[int]:
    """The ints in nested arguments, the bounds of slices among them."""
    if isinstance(structure, int):
        yield structure
    elif isinstance(structure, (tuple, list)):
        yield from chain.from_iterable(map(integers_in, structure))
    elif isinstance(structure, slice):
        yield from (one for one in (structure.start, structure.stop) if isinstance(one, int))


class Call:
    """One operator call as a rule sees it: arguments by name, labels, outputs.

    Attributes
    ----------
    target
        The overload that ran.
    args
        Every argument by its schema name, defaults filled in.
    outputs
        The tensors that came out, in order.
    strides
        Those that the first argument had before the call (an operator may change them in place).
    given
        The arguments of the torch function around the call, as the forward wrote them; None
        where it was called by something else.
    is_state
        Whether a tensor is computed from parameters and buffers alone.
    positions_in
        The label of the dim along which a tensor's values are positions (the experts that a
        router picks); None for any other tensor.
    followed
        Tensors of which the rule asked that: what else reads positions keeps their dim whole.
    """

    def __init__(
        self,
        target: OpOverload,
        args: dict[str, Any],
        outputs: tuple[Tensor, ...],
        algebra: Algebra,
        labels_of: Callable[[Tensor], Labels],
        context: Pin,
        strides: tuple[int, ...] = (),
        given: Given | None = None,
        is_state: Callable[[Tensor], bool] = lambda tensor: False,
        positions_in: Callable[[Tensor], Label | None] = lambda tensor: None,
    ) -> None:
        self.target = target
        self.args = args
        self.outputs = outputs
        self.algebra = algebra
        self.context = context
        self.strides = strides
        self.given = given
        self.is_state = is_state
        self.followed: list[Tensor] = []
        self._positions_in = positions_in
        self._labels_of = labels_of

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload: ``"convolution"``."""
        return str(self.target._schema.name).partition("::")[2]

    def tensors(self) -> Iterator[tuple[Path, Tensor]]:
        """Every tensor argument with its place."""
        return tensors_in(self.args)

    def labels(self, name: str, index: int | None = None) -> Labels:
        """Labels of a tensor argument; of ``None`` an empty tuple."""
        value = self.args[name] if index is None else self.args[name][index]
        return () if value is None else self._labels_of(value)

    def positions(self, name: str, index: int | None = None) -> Label | None:
        """The label of the dim along which a tensor argument holds positions, which is followed."""
        tensor = self.args[name] if index is None else self.args[name][index]
        found = None if tensor is None else self._positions_in(tensor)
        if found is not None:
            self.followed.append(tensor)
        return found

    def labels_of(self, tensor: Tensor) -> Labels:
        """Labels of any tensor that the forward holds."""
        return self._labels_of(tensor)

    def why(self, reason: str) -> Pin:
        """The reason, in the context of this call."""
        own = self.context
        return Pin(reason, own.operator, own.module, own.source)

    def unify(self, a: Label | None, b: Label | None, reason: str = "") -> Label | None:
        """Tie two dims of the same size."""
        return self.algebra.unify(a, b, self.why(reason or "tied to a dim that nothing can prune"))

    def pin(self, label: Label | None, reason: str) -> None:
        """Keep every position of a dim."""
        self.algebra.pin(label, self.why(reason))

    def pin_first(self, label: Label | None, count: int, reason: str) -> None:
        """Keep the first positions of a dim."""
        self.pin(None if label is None else label[:count], reason)

    def pin_all(self, reason: str) -> None:
        """Keep every position of every dim of every tensor argument."""
        for _, tensor in self.tensors():
            for label in self._labels_of(tensor):
                self.pin(label, reason)

    def keep(self, labels: Sequence[Label | None], dims: Iterable[int], reason: str) -> Labels:
        """Keep every position of some dims; returns the labels without theirs."""
        chosen = list(dict.fromkeys(dim % len(labels) for dim in dims)) if labels else []
        for dim in chosen:
            self.pin(labels[dim], reason)
        return tuple(None if dim in chosen else label for dim, label in enumerate(labels))

    def join(self, labels: Sequence[Label | None]) -> Label | None:
        """Tie dims of the same size; returns the label of all."""
        joined, *others = labels
        for other in others:
            joined = self.unify(joined, other)
        return joined

    def split(
        self, label: Label | None, sizes: tuple[int, int], reason: str, *, pinned: int
    ) -> Label | None:
        """One of two dims into which a dim is viewed, of which the other, ``pinned``, is kept."""
        parts = self.algebra.split(label, sizes, self.why(reason))
        self.pin(parts[pinned], reason)
        return parts[1 - pinned]

    def give_up(self, reason: str) -> Effect:
        """Keep every position of every dim of every tensor."""
        self.pin_all(reason)
        return Effect(self.unlabelled())

    def unlabelled(self) -> tuple[Labels, ...]:
        """Outputs of which nothing is prunable."""
        return tuple((None,) * output.dim() for output in self.outputs)

    def given_to(self, *names: str) -> Given | None:
        """What the forward wrote, if the function around the call is one of these."""
        return self.given if self.given is not None and self.given.name in names else None

    def inner_name(self, kind: str) -> str:
        """A name for dims that the call makes, as no tensor of state has them."""
        return f"{kind} in {self.context.module or 'model'} #{self.algebra.count}"


def tensors_in(args: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among bound arguments, lists included, with its place."""
    for name, value in args.items():
        if isinstance(value, Tensor):
            yield (name,), value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield (name, index), item


Rule = Callable[[Call], Effect]

_RULES: dict[OpOverload, Rule] = {}
_TAG_RULES: dict[torch.Tag, Rule] = {}


def rule(*overloads: str) -> Callable[[Rule], Rule]:
    """Register a rule for overloads, named as ``"relu"``, ``"add.Tensor"`` or ``"mylib::op"``.

    Without namespace an operator is ATen's, without overload the default one.

    Raises
    ------
    RuleError
        If an overload does not exist, or has a rule already.
    """

    def register(function: Rule) -> Rule:
        for text in overloads:
            target = find_overload(text)
            known = _RULES.get(target)
            if known is not None and not is_imported_again(known, function):
                raise RuleError(
                    f"{text} has a rule already: {known.__name__}",
                    where=function.__name__,
                    fix="extend that rule, or take the name off one of the two",
                )
            _RULES[target] = function
        return function

    return register


def is_imported_again(known: Any, function: Any) -> bool:
    """Whether one is the other from an import of the same file that was interrupted."""
    names = ("__module__", "__qualname__", "__code__")
    first, second = ([getattr(one, name, None) for name in names] for one in (known, function))
    return known is not function and None not in first and first == second


def rule_for_tag(tag: torch.Tag) -> Callable[[Rule], Rule]:
    """Register a rule for every overload that PyTorch itself gives the tag and none names.

    One that returns no tensor (``equal``) is left out: it reads values, whatever its tag says.
    """

    def register(function: Rule) -> Rule:
        _TAG_RULES[tag] = function
        return function

    return register


def find_overload(text: str) -> OpOverload:
    """The overload that a name in a rule means; :class:`~prunus.errors.RuleError` if none."""
    namespace, _, name = text.rpartition("::")
    packet, _, overload = name.partition(".")
    try:
        found = getattr(getattr(torch.ops, namespace or "aten"), packet)
        target = getattr(found, overload or "default")
    except AttributeError:
        target = None
    if not isinstance(target, OpOverload):
        raise RuleError(
            f"there is no operator {text!r}",
            why="a rule is registered by namespace::name.overload, as PyTorch spells it",
            fix="look at torch.ops.<namespace>.<name>.overloads()",
        )
    return target


def find_rule(target: OpOverload) -> Rule | None:
    """The rule of an overload: its own, or that of a tag it carries; None if unknown."""
    _import_rules()
    found = _RULES.get(target)
    if found is None and returns_tensor(target):
        found = next((_TAG_RULES[tag] for tag in target.tags if tag in _TAG_RULES), None)
    return found


def returns_tensor(target: OpOverload) -> bool:
    """Whether tensors come out, alone or in a list."""
    return any("Tensor" in str(value.type) for value in target._schema.returns)


def registered() -> Mapping[OpOverload, Rule]:
    """Every overload with a rule of its own."""
    _import_rules()
    return dict(_RULES)


def bind(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, with defaults."""
    bound = dict(_defaults(target))
    bound.update(zip(bound, args, strict=False))
    bound.update({name: value for name, value in kwargs.items() if name in bound})
    return bound


def call_bound(target: OpOverload, bound: Mapping[str, Any]) -> Any:
    """Run an overload on arguments by name."""
    positional, named = _names(target)
    return target(*(bound[name] for name in positional), **{name: bound[name] for name in named})


@functools.lru_cache(1 << 12)
def _defaults(target: OpOverload) -> dict[str, Any]:
    """An overload's arguments with their defaults, in order: its schema takes time to read."""
    return {argument.name: argument.default_value for argument in target._schema.arguments}


@functools.lru_cache(1 << 12)
def aliases(target: OpOverload) -> bool:
    """Whether what an operator returns is memory that was there before."""
    return any(one.alias_info for one in target._schema.returns)


@functools.lru_cache(1 << 12)
def _names(target: OpOverload) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """An overload's positional and keyword-only arguments: its schema takes time to read."""
    arguments = target._schema.arguments
    return (
        tuple(a.name for a in arguments if not a.kwarg_only),
        tuple(a.name for a in arguments if a.kwarg_only),
    )


_imported = False


def _import_rules() -> None:
    global _imported
    if not _imported:
        rules = importlib.import_module("prunus.tracer.rules")
        for module in pkgutil.iter_modules(rules.__path__):
            importlib.import_module(f"{rules.__name__}.{module.name}")
        _imported = True  # last, for an interrupt may come in the middle


SUMMED = "as many copies as a size says are summed, averaged or normalised here"


def summed_copies(call: Call, effect: Effect) -> Iterator[tuple[Label, Pin]]:
    """Dims of copies over which an operator sums or looks, and that meet nothing else there."""
    algebra = call.algebra
    if not algebra.has_copies:
        return
    summed = [_label(call, place) for place in effect.contracted]
    for place in effect.mixing:
        looked = algebra.copied(_label(call, place))
        if looked is not None:
            yield looked, call.why(SUMMED)
    others = _met_by(algebra, summed)
    for copies in map(algebra.copied, summed):
        if copies is not None and not np.isin(algebra.find(copies), others).any():
            yield copies, call.why(SUMMED)


def _met_by(algebra: Algebra, labels: Sequence[Label | None]) -> Atoms:
    """The roots of labels that are not of copies."""
    met = [label for label in labels if label is not None and algebra.copied(label) is None]
    return np.concatenate(
        [np.zeros(0, dtype=np.int64), *(algebra.find(one).ravel() for one in met)]
    )


def _label(call: Call, place: Place) -> Label | None:
    (name, *rest), dim = place
    return call.labels(str(name), *rest)[dim]  # type: ignore[arg-type]
