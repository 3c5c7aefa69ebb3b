"""Run the model's forward once and record every operator with the labels it leaves.

Operators run on fake tensors: nothing is computed, and Python control flow just runs.  Where that
is not enough, the run is repeated on real tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.graph.axis import Axis, Label
from prunus.graph.groups import Pin
from prunus.graph.program import Effect, Labels, Node, Program, Ref
from prunus.tracer.fakes import Fakes, Shadows, storage_of
from prunus.tracer.follow import Follow
from prunus.tracer.labels import Algebra
from prunus.tracer.outside import Watch
from prunus.tracer.provenance import Run, expression_of
from prunus.tracer.quiet import ALL_TRUE, asks_which
from prunus.tracer.registry import Call, Given, aliases, bind, find_rule, summed_copies
from prunus.tracer.sizes import Sizes
from prunus.tracer.softmax_scale import Attention
from prunus.tracer.sources import find_source
from prunus.tracer.units import Lifetimes, Resolver
from prunus.tracer.wrappers import refuse_nested

PASSIVE = {
    "prim::device",
    "prim::layout",
    "aten::sym_size",
    "aten::sym_numel",
    "aten::is_pinned",
    "aten::_local_scalar_dense",
}

PASSES = {
    *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose"),
    *("t", "alias", "detach", "clone", "_to_copy", "slice", "select", "unbind", "index", "sort"),
}
"""Operators whose first output holds values of their first argument, which they only arrange.

A sort puts positions in the same order whether or not others are left out.
"""


class Recorder(TorchDispatchMode):
    """The dispatch mode that sees every operator of one forward.

    Parameters
    ----------
    state
        Name → tensor; every dim longer than 1 gets atoms of its own when the tensor is met.
    watch
        Is told of every fake tensor and every traced integer.
    real
        Compute on real tensors instead of fake ones.
    apart
        See :class:`prunus.tracer.provenance.Run`.

    Attributes
    ----------
    stack
        Paths of the modules that are running, the innermost last.
    sealed
        Paths of modules whose code can't be followed: what runs in them pins all that it gets.
    holds
        By module how many experts it may hold; see :func:`prunus.tracer.quiet.visits`.
    """

    def __init__(
        self, state: dict[str, Tensor], watch: Watch, *, real: bool, apart: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.algebra = Algebra()
        self.nodes: list[Node] = []
        self.unknown: Counter[str] = Counter()
        self.state: dict[int, str] = {}
        self.constants: dict[int, Tensor] = {}
        self.labels: list[Labels] = []
        self.shapes: list[tuple[int, ...]] = []
        self.strides: list[tuple[int, ...]] = []
        self.from_state: list[bool] = []
        self.stack: list[str] = [""]
        self.sealed: frozenset[str] = frozenset()
        self.holds: Mapping[str, Collection[int]] = {}
        self.attended: list[Attention] = []
        self.lifetimes = Lifetimes(self.nodes.__len__)
        self._counted: dict[int, list[tuple[Label, Pin]]] = {}
        self._summed: list[tuple[Label, Pin]] = []
        self._begun: weakref.ref[Given] | None = None  # it holds tensors, which are to die
        self.sizes = Sizes(self.algebra, self.stack)
        self.follow = Follow(self.sizes, self.label_of, self.seal)
        self.run = Run(watch.add, apart=apart)
        self._fakes = None if real else Fakes(watch)
        self._values: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._shadows = Shadows()
        self._names = {id(tensor): name for name, tensor in state.items()}
        self._storages = {storage_of(tensor): name for name, tensor in state.items()}
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._by_name: dict[str, int] = {}

    def fake_input(self, tensor: Tensor) -> Tensor:
        """An input as the forward will see it; its dims are never pruned."""
        if self._fakes is not None:
            fake = self._fakes.of(tensor.detach())
            if tensor.numel() <= Shadows.LARGEST and not tensor.is_floating_point():
                self._shadows.keep(fake, tensor.detach())
            tensor = fake
        else:
            tensor = tensor.detach().clone()
        number = self._new_value(tensor, (None,) * tensor.dim(), from_state=False)
        self.lifetimes.begin(tensor, number)
        return tensor

    def value_of(self, tensor: Tensor) -> int:
        """The number of a tensor's value; unknown ones become state or constants."""
        number = self.number_of(tensor)
        if number is not None:
            return number
        name = self._name_of(tensor)
        if name is None:
            number = self._new_value(tensor, (None,) * tensor.dim(), from_state=True)
            self.constants[number] = tensor
        elif name in self._by_name:
            number = self._by_name[name]
            self._values[id(tensor)] = weakref.ref(tensor), number
        else:
            number = self._new_state(tensor, name)
        return number

    def _name_of(self, tensor: Tensor) -> str | None:
        """The name of a tensor of state, or of the one whose memory it is as a whole."""
        name = self._names.get(id(tensor))
        if name is None and not isinstance(tensor, FakeTensor):
            found = self._storages.get(storage_of(tensor))
            if found is not None and tensor.shape == self._shapes[found]:
                name = found
        return name

    def _new_state(self, tensor: Tensor, name: str) -> int:
        dense = tensor.layout == torch.strided  # nothing slices another one
        labels: Labels = tuple(
            self.algebra.fresh(size, Axis(name, dim))[:, None] if dense and size > 1 else None
            for dim, size in enumerate(tensor.shape)
        )
        number = self._new_value(tensor, labels, from_state=True)
        self._by_name[name] = number
        self.state[number] = name
        return number

    def release(self) -> None:
        """Let go of every tensor that was made; what was recorded stays."""
        self._fakes = None
        self.follow.arrays.clear()
        self._values.clear()
        self._shadows = Shadows()

    def number_of(self, tensor: Tensor | None) -> int | None:
        """The number of a value that is known already; None for any other."""
        known = self._values.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def pin(self, label: Label | None, reason: str) -> None:
        """Pin in the name of the tracer itself."""
        self.algebra.pin(label, Pin(reason, "", "", ""))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in PASSIVE:
            return self._passive(func, args, kwargs)
        if asks_which(func, args) and len(args[0]) in self.holds.get(self.stack[-1], ()):
            args = (self.__torch_dispatch__(ALL_TRUE, types, args),)
        known = None if self._fakes is None else self._shadows.run(func, args, kwargs)
        strides = _strides(args[0]) if args else ()
        out = self._run(func, args, kwargs)
        self._record(func, bind(func, args, kwargs), out, strides)
        self._shadows.ran(func, (args, kwargs), out, known)
        return out

    def _passive(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """What leaves no trace: questions about a tensor, and values that are known."""
        if func._schema.name == "aten::_local_scalar_dense":
            self.read(args[0])
            shadow = self._shadows.of(args[0])
            if shadow is not None:
                with unset_fake_temporarily():
                    return shadow.item()
        return self._run(func, args, kwargs)

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if self._fakes is None:
            return func(*args, **kwargs)
        return self._fakes.run(func, args, kwargs)

    def _record(
        self, func: OpOverload, bound: dict[str, Any], out: Any, strides: tuple[int, ...]
    ) -> None:
        context = Pin("", str(func), self.stack[-1], find_source(sys._getframe(2)))
        outputs = (out,) if isinstance(out, Tensor) else tuple(_tensors_in(out))
        if any(tensor.is_nested for tensor in outputs):
            refuse_nested(context.operator, context.module, context.source)
        given = self.follow.given
        if given is not None:
            self._enter_function(given, context)
        call = Call(
            func,
            bound,
            outputs,
            self.algebra,
            self._labels_of,
            context,
            strides,
            given,
            self._is_state,
            self._positions_in,
        )
        args = {name: _refer(value, self.value_of) for name, value in bound.items()}
        from_state = all(call.is_state(tensor) for _, tensor in call.tensors())
        effect = self._effect_of(call)
        passed = self._passed_on(call)
        if self._counted:
            self._read_all(call)
        labels = call.unlabelled() if effect is None else effect.outputs
        numbers = self._number(call, labels, from_state=from_state)
        self._count(call, effect, numbers, passed)
        self.nodes.append(Node(func, args, numbers, effect, context.module, context.source))

    def _count(
        self, call: Call, effect: Effect | None, numbers: Sequence[int], passed: list[Any]
    ) -> None:
        """Remember which outputs hold positions along a dim."""
        for number in numbers[: 1 if call.name == "sort" else None] if passed else ():
            self._counted[number] = list(passed)
        for output, label in () if effect is None else effect.counted:
            why = call.why("positions along this dim are counted")
            self._counted.setdefault(numbers[output], []).append((label, why))

    def _effect_of(self, call: Call) -> Effect | None:
        """What the operator's rule says; without one, all that goes in is pinned."""
        rule = find_rule(call.target)
        if call.context.module in self.sealed:
            call.pin_all("the code of a ScriptModule can't be followed")
            return None
        if rule is None:
            self._pin_unknown(call)
            return None
        effect = rule(call)
        self._summed.extend(summed_copies(call, effect))
        for expression, size, label in effect.equations:
            self.sizes.equate(expression, size, label, call.context)
        return effect

    def _number(self, call: Call, labels: Sequence[Labels], *, from_state: bool) -> tuple[int, ...]:
        """Numbers for the outputs of a call; those that are new memory are born."""
        for tensor, own in zip(call.outputs, labels, strict=True):
            if len(own) != tensor.dim():
                raise AssertionError(
                    f"the rule of {call.target} gave {len(own)} labels for {tensor.dim()} dims"
                )
        numbers = tuple(
            self._new_value(tensor, own, from_state=from_state)
            for tensor, own in zip(call.outputs, labels, strict=True)
        )
        if not aliases(call.target):
            for tensor, number in zip(call.outputs, numbers, strict=True):
                self.lifetimes.begin(tensor, number)
        return numbers

    def program(self, inputs: Sequence[int], outputs: Mapping[str, int]) -> Program:
        """What was recorded, with labels of atoms."""
        return Program(
            tuple(self.nodes),
            tuple(inputs),
            self.state,
            self.constants,
            outputs,
            tuple(self.labels),
            tuple(self.shapes),
            self.algebra.canonical,
            tuple(self.lifetimes.found),
            tuple(self.strides),
        )

    def resolver(self, names: Sequence[str]) -> Resolver:
        """The units of the tensors of state as they are tied now, numbered in that order."""
        return Resolver(self.algebra, self.labels, self.state, names)

    def finish(self) -> None:
        """After the forward: pin what only then is known to be a plain number."""
        for label, why in self._summed:
            self.algebra.pin_copies(label, why)
        self.sizes.finish()

    def _labels_of(self, tensor: Tensor) -> Labels:
        return self.labels[self.value_of(tensor)]

    def _is_state(self, tensor: Tensor) -> bool:
        return self.from_state[self.value_of(tensor)]

    def _positions_in(self, tensor: Tensor) -> Label | None:
        """The label of the one dim along which a tensor's values are positions."""
        found = self._counted.get(self.value_of(tensor), ())
        return found[0][0] if len(found) == 1 else None

    def _passed_on(self, call: Call) -> list[tuple[Label, Pin]]:
        """The dims along which the outputs hold positions because the first argument does."""
        name = next(iter(call.args), "")
        if not self._counted or call.name not in PASSES or not isinstance(call.args[name], Tensor):
            return []
        call.positions(name)
        return self._counted.get(self.value_of(call.args[name]), [])

    def read(self, tensor: Tensor) -> None:
        """Something reads a tensor: if it holds positions along a dim, that dim stays whole."""
        for label, why in self._counted.pop(self.value_of(tensor), ()):
            self.algebra.pin(label, why)

    def _read_all(self, call: Call) -> None:
        """An operator reads its arguments, but for positions that its rule has followed."""
        for _, tensor in call.tensors():
            if not any(tensor is one for one in call.followed):
                self.read(tensor)

    def _enter_function(self, given: Given, why: Pin) -> None:
        """Take down what a torch function is told, whatever operators it consists of."""
        first = self._begun is None or given is not self._begun()
        self._begun = weakref.ref(given)
        if given.name in ("layer_norm", "rms_norm") and first:
            tensor, written = given.argument(0, "input"), given.argument(1, "normalized_shape")
            labels, shape = self._labels_of(tensor), tensor.shape
            for dim in range(-len(written), 0):
                expression = expression_of(written[dim])
                if expression is not None:
                    self.sizes.equate(expression, shape[dim], labels[dim], why)
        elif given.name == "scaled_dot_product_attention" and given.argument(6, "scale") is None:
            index = len(self.nodes)
            if not first:
                why = self.attended[-1].why
                index = self.attended.pop().nodes.start
            operands = [given.argument(i, n) for i, n in enumerate(("query", "key", "value"))]
            query, *others = map(self.value_of, operands)
            nodes = range(index, len(self.nodes) + 1)
            self.attended.append(Attention(query, query not in others, nodes, why))

    def label_of(self, tensor: Tensor, dim: int) -> Label | None:
        """The label of a dim of a tensor that is known; None without one."""
        number = self.number_of(tensor)
        if number is None:
            if id(tensor) not in self._names:
                return None
            number = self.value_of(tensor)
        label: Label | None = self.labels[number][dim]
        return label

    def seal(self, arguments: Any, reason: str) -> None:
        """Pin whatever goes into a function that can't be seen into."""
        why = Pin(reason, "", self.stack[-1], find_source(sys._getframe(2)))
        for tensor in _tensors_in(arguments):
            self.read(tensor)
            for label in self._labels_of(tensor):
                self.algebra.pin(label, why)

    def _pin_unknown(self, call: Call) -> None:
        labels = [label for _, tensor in call.tensors() for label in self._labels_of(tensor)]
        if any(self.algebra.canonical(label) is not None for label in labels):
            self.unknown[str(call.target)] += 1
            call.pin_all(f"no rule for {call.target}")

    def _new_value(self, tensor: Tensor, labels: Labels, *, from_state: bool) -> int:
        number = len(self.labels)
        self.labels.append(labels)
        self.shapes.append(tuple(tensor.shape))
        self.strides.append(tensor.stride() if tensor.layout == torch.strided else ())
        self.from_state.append(from_state)
        self._values[id(tensor)] = weakref.ref(tensor), number
        return number


def _strides(value: Any) -> tuple[int, ...]:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return value.stride() if dense else ()


def _tensors_in(structure: Any) -> Iterator[Tensor]:
    return filter(torch.is_tensor, tree_leaves(structure))


def _refer(value: Any, number: Callable[[Tensor], int]) -> Any:
    if isinstance(value, Tensor):
        return Ref(number(value))
    if isinstance(value, (list, tuple)):
        return [_refer(item, number) for item in value]
    return value
