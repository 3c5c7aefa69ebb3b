"""How much of what a schedule removes is gone after each round."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

from prunus.errors import PlanError

ShapeName = Literal["one_shot", "linear", "cubic", "geometric"]
Shape = ShapeName | Callable[[float], float]

_DONE: dict[str, Callable[[Fraction], Fraction]] = {
    "one_shot": lambda t: Fraction(1),
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
}
"""The share of the removal that is done after the share t of the rounds.

``cubic`` is equation 1 of Zhu & Gupta, "To prune, or not to prune" (2017), from no sparsity on.
"""


def check_shape(shape: Any, steps: int) -> None:
    """Refuse a shape that there is not, or a function that does not lead from 0 up to 1.

    Raises
    ------
    PlanError
        The message names what a shape can be.
    """
    known = ", ".join(map(repr, get_args(ShapeName)))
    if not callable(shape):
        if shape not in get_args(ShapeName):
            fix = f"give one of {known}, or a function of t that returns the share removed by then"
            raise PlanError(f"shape={shape!r} is no shape of a schedule", fix=fix)
        return
    values = [shape(number / steps) for number in range(1, steps + 1)]
    rising = all(a <= b for a, b in zip([0.0, *values], values, strict=False))
    if not rising or not math.isclose(values[-1], 1.0, abs_tol=1e-9):
        raise PlanError(
            f"shape= returned {', '.join(f'{value:g}' for value in values)} over {steps} steps",
            why="it is the share of the removal that is done, which never falls and ends at 1",
            fix=f"give one of {known}, or lambda t: t**2, say",
        )


def bound_after(shape: Shape, dense: int, final: int, number: int, steps: int) -> int:
    """The bound on a cost in a round.

    Parameters
    ----------
    dense, final
        The cost of the original model, and its bound in the last round.
    number, steps
        The round, from 1 on, of so many.

    Examples
    --------
    >>> [bound_after("cubic", 1000, 500, number, 4) for number in (1, 2, 3, 4)]
    [710, 562, 507, 500]
    >>> [bound_after("geometric", 1000, 250, number, 2) for number in (1, 2)]
    [500, 250]
    """
    if number == steps or final >= dense:
        return final
    if shape == "geometric":
        return max(final, math.floor(dense * math.pow(final / dense, number / steps)))
    done = shape(number / steps) if callable(shape) else _DONE[shape](Fraction(number, steps))
    return max(final, math.floor(dense - (dense - final) * Fraction(done)))
