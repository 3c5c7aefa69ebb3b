"""What the forward's code does with sizes: states them, compares them, computes with them.

A size that a view states follows when the width changes.  One that the code compares has to
compare the same afterwards.  One that it computes with beyond integer arithmetic is pinned, with
the line that does so.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils._pytree import tree_leaves

from prunus.graph.axis import Label
from prunus.graph.expressions import (
    Attribute,
    Condition,
    Equation,
    Expression,
    Operation,
    Width,
    evaluate,
    leaves_of,
)
from prunus.graph.groups import Pin
from prunus.tracer.labels import COUNT_TRIALS, Algebra
from prunus.tracer.provenance import Provenance, Ratio, expression_of, key_of
from prunus.tracer.sources import code_frame, find_source, users_frame

COMPUTED = "the code computes with this size"
WHOLE = "the code takes as many positions as another size says, here all of them"


class Sizes:
    """The equations, conditions and pins that one forward's use of integers comes to.

    Parameters
    ----------
    algebra
        What is tied and pinned in.
    stack
        The paths of the modules that run, innermost last.
    """

    def __init__(self, algebra: Algebra, stack: Sequence[str]) -> None:
        self.equations: list[Equation] = []
        self.conditions: list[Condition] = []
        self.attributes: dict[Attribute, int] = {}
        self._algebra, self._stack = algebra, stack
        self._governed: dict[str, Label | None] = {}
        self._fixed: set[Attribute] = set()
        self._casts: dict[int, list[_Cast]] = {}
        self._ratios: dict[int, tuple[Ratio, str, str]] = {}
        self._asked: set[Any] = set()

    def equate(self, expression: Expression, size: int, label: Label | None, why: Pin) -> None:
        """What the forward's code says a size is: tie, pin, or remember to check."""
        if isinstance(expression, int):
            cast = self._cast_of(expression, label)
            if cast is None:
                if _is_computed(expression):
                    return
                self._algebra.pin(label, replace(why, reason="the code fixes this size"))
                return
            expression = cast
        elif isinstance(expression, Width):
            self._count_as(expression.label, label, why)
        else:
            key = key_of(expression)
            if key in self._governed:
                self._count_as(self._governed[key], label, why)
            else:
                self._governed[key] = label
        self.equations.append(Equation(expression, Width(size, label), why.module, why.source))

    def governed(self, expression: Expression) -> Label | None:
        """The dim whose width an expression was found to state, if any was."""
        return self._governed.get(key_of(expression))

    def escaped(self, expression: Expression) -> None:
        """The forward computes with a size: neither it nor what governs it may change."""
        self._escape(expression, self._pin(COMPUTED))

    def returned(self, answer: Any) -> Any:
        """What the forward answers with: a size among it stays what it was."""
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Provenance):
                self._escape(leaf.expression, self._pin("the forward returns this size"))
        return answer

    def counted(self, expression: Expression, value: int) -> None:
        """The forward does something that often: as often as before, whatever is removed."""
        if self._is_rounded(expression):
            self.escaped(expression)
        else:
            module, source = self._place()
            self.equations.append(Equation(expression, Width(value, None), module, source))

    def compared(self, op: str, a: Expression, b: Expression, outcome: bool) -> None:
        """The forward takes one path or another by a size: remember to check, or pin.

        Where no width alone decides, but the resolution or the number of samples as well, another
        input may decide otherwise: then the size is pinned.
        """
        frame = code_frame(sys._getframe(1))
        if op == "==" and outcome:
            self._follow_check(a, b)
        if frame is None or (op == "==" and not _is_comparison(frame)):
            return
        if op == "bool":
            op, outcome = "==", not outcome
        why = self._pin("the code compares this size")
        key = (op, outcome, why.source, why.module, key_of(a), key_of(b))
        if key not in self._asked:
            self._asked.add(key)
            found = Condition(op, a, b, outcome, why.module, why.source)
            self._keep_path(found, why, constant=_is_constant(frame))

    def _keep_path(self, found: Condition, why: Pin, *, constant: bool) -> None:
        pairs = ((found.left, found.right), (found.right, found.left))
        if any(_is_positive(one) and other in (0, 1) for one, other in pairs):
            return  # never zero, and where it comes down to one the comparison of outputs tells
        self.conditions.append(found)
        for one, other in pairs:
            mixed = _may_depend_on_inputs(found.op, one, other, found.outcome, constant)
            if mixed or self._is_rounded(one):
                self._escape(one, why)

    def cast(self, expression: Expression, value: int, ratio: Ratio | None) -> None:
        """The code takes a plain int: an escape, unless it is to state a size."""
        if ratio is not None:
            self._ratios.pop(id(ratio), None)
        if not any(isinstance(leaf, Width) for leaf in leaves_of(expression)):
            self.escaped(expression)
            return
        self._casts.setdefault(value, []).append(_Cast(expression, self._pin(COMPUTED)))

    def divided(self, ratio: Ratio) -> None:
        """The code divides: an escape, unless it takes the plain int of the quotient."""
        self._ratios[id(ratio)] = ratio, *self._place()

    def whole(self, label: Label, stated: int) -> None:
        """The code takes so many positions of a dim, which are all of them in this run."""
        expression, size = expression_of(stated), len(label)
        why = self._pin(WHOLE)
        if isinstance(expression, Operation) and stated == -size and expression.left == 0:
            expression, stated = expression.right, size
        if isinstance(expression, int) or expression is None:
            self._algebra.pin(label, why)
        elif stated == size:
            self.equate(expression, size, label, why)
        else:
            self.conditions.append(
                Condition(">=", expression, Width(size, label), True, why.module, why.source)
            )

    def finish(self) -> None:
        """After the forward: what was taken as a plain number, and stated no size, is pinned."""
        for ratio, module, source in self._ratios.values():
            self._escape(ratio.expression, Pin(COMPUTED, "", module, source))
        for casts in self._casts.values():
            for cast in casts:
                if not cast.stated:
                    self._escape(cast.expression, cast.why)
        self._ratios.clear()

    def _is_rounded(self, expression: Expression) -> bool:
        """Whether a quotient in it has a remainder, which the sizes of this run decide."""
        if not isinstance(expression, Operation):
            return False
        sides = [
            evaluate(side, self.attributes.__getitem__, lambda width: width.size)
            for side in (expression.left, expression.right)
        ]
        rounded = expression.op in ("//", "%") and sides[0] % sides[1] != 0
        return rounded or self._is_rounded(expression.left) or self._is_rounded(expression.right)

    def _place(self) -> tuple[str, str]:
        return self._stack[-1], find_source(sys._getframe(2))

    def _pin(self, reason: str) -> Pin:
        return Pin(reason, "", *self._place())

    def _escape(self, expression: Expression, why: Pin) -> None:
        for leaf in leaves_of(expression):
            if isinstance(leaf, Width):
                self._algebra.pin(leaf.label, why)
            elif isinstance(leaf, Attribute) and leaf not in self._fixed:
                self._fixed.add(leaf)
                self._algebra.pin(self._governed.get(key_of(leaf)), why)
                self._governed[key_of(leaf)] = None
                if leaf in self.attributes:
                    value = Width(self.attributes[leaf], None)
                    self.equations.append(Equation(leaf, value, why.module, why.source))

    def _follow_check(self, a: Expression, b: Expression) -> None:
        """The forward checks that an attribute says what a width is: so it has to follow.

        A shape that a module remembers of its last input is compared item by item; such a memory
        is made anew where it does not fit.
        """
        for one, width in ((a, b), (b, a)):
            remembered = isinstance(one, Attribute) and any(isinstance(k, int) for k in one.keys)
            if isinstance(one, Attribute) and isinstance(width, Width) and not remembered:
                self.equate(one, width.size, width.label, self._pin(""))

    def _count_as(self, a: Label | None, b: Label | None, why: Pin) -> None:
        """Two dims have one size: tie them, unless they keep equally many by construction."""
        if not self._algebra.count_alike(a, b):
            reason = "the code takes one size for the other"
            self._algebra.unify(a, b, replace(why, reason=reason))

    def _cast_of(self, value: int, label: Label | None) -> Expression | None:
        """What a plain int was computed from, if that keeps agreeing with a dim's width."""
        if label is None:
            return None
        for cast in self._casts.get(value, ()):
            if self._agrees(cast.expression, label):
                cast.stated = True
                return cast.expression
        return None

    def _agrees(self, expression: Expression, label: Label) -> bool:
        """Whether an expression of widths is the width of a dim, under random selections."""
        leaves = list(leaves_of(expression))
        if any(isinstance(leaf, Attribute) for leaf in leaves):
            return False
        widths = [Width(len(label), label), *(leaf for leaf in leaves if isinstance(leaf, Width))]
        canonical = {id(width): self._algebra.canonical(width.label) for width in widths}
        for seed in range(COUNT_TRIALS):
            kept = np.random.default_rng(seed).random(self._algebra.count) > 0.3
            kept[0] = True

            def count(of: Width, kept: Any = kept) -> int:
                own = canonical[id(of)]
                return of.size if own is None else int(kept[own].all(axis=1).sum())

            if evaluate(expression, lambda _: 0, count) != count(widths[0]):
                return False
        return True


class _Cast:
    """An expression of which the code took the plain int, and whether that stated a size."""

    def __init__(self, expression: Expression, why: Pin) -> None:
        self.expression, self.why, self.stated = expression, why, False


def _is_positive(expression: Expression) -> bool:
    """Whether it can't come to zero: nothing is left without a position."""
    if isinstance(expression, Operation):
        positive = _is_positive(expression.left) and _is_positive(expression.right)
        return expression.op in "+*" and positive
    return not isinstance(expression, int) or expression > 0


def _may_depend_on_inputs(
    op: str, one: Expression, other: Expression, outcome: bool, constant: bool
) -> bool:
    """Whether what a comparison comes to may hang on the inputs' sizes, which are plain ints."""
    if isinstance(one, int):
        return False
    mixed = {int, Width} <= {type(leaf) for leaf in leaves_of(one) if leaf not in (-1, 0, 1)}
    several = isinstance(other, int) and other > 1
    if op != "==":
        return mixed or (several and not constant)
    return mixed and several and not outcome


def _is_computed(value: int) -> bool:
    """Whether the line that states a size computes it by ``shape.numel()``, which nobody hears of.

    The check of the cut model tells if it does not.
    """
    frame = users_frame(sys._getframe(1))
    return frame is not None and (
        "numel" in frame.f_code.co_names and value not in frame.f_code.co_consts
    )


def _is_constant(frame: Any) -> bool:
    """Whether the right side of the comparison that a frame is at stands in the code itself."""
    before = ""
    for one in dis.get_instructions(frame.f_code):
        if one.offset == frame.f_lasti:
            break
        if one.opname != "CACHE":
            before = one.opname
    return before == "LOAD_CONST"


def _is_comparison(frame: Any) -> bool:
    """Whether the code itself compares, rather than a dict that looks for a key."""
    name: str = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name.startswith(("COMPARE_OP", "CONTAINS_OP"))
