"""Budgets: upper bounds on costs, as fractions of the dense cost or as absolute numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any

from prunus.errors import BudgetError

if TYPE_CHECKING:
    from prunus.graph.coupling import CouplingGraph

_FIX = "give a float in (0, 1] for a fraction of the dense cost, or an int ≥ 2 for a number"


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost at most; several bounds may be given and all will hold.

    Parameters
    ----------
    params, macs
        A float in (0, 1] is a fraction of the dense cost, an int ≥ 2 an absolute number.

    Examples
    --------
    >>> Budget(macs=0.5)
    Budget(params=None, macs=0.5)
    >>> Budget(params=2_000_000, macs=0.5).requested
    {'macs': 0.5, 'params': 2000000}
    """

    params: float | int | None = None
    macs: float | int | None = None

    def __post_init__(self) -> None:
        if not self.requested:
            raise BudgetError(
                "the budget bounds nothing",
                why="neither params nor macs was given",
                fix="write Budget(macs=0.5), say",
            )
        for name, value in self.requested.items():
            _check(name, value)

    @property
    def requested(self) -> dict[str, float | int]:
        """The bounds that were given, sorted by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: given[name] for name in sorted(given) if given[name] is not None}

    def limits(self, graph: CouplingGraph) -> dict[str, int]:
        """The largest allowed value of every bounded cost, sorted by name.

        A fraction is taken for the decimal number that was written, so 0.29 of 100 is 29.
        """
        found: dict[str, int] = {}
        for name, value in self.requested.items():
            if name not in graph.costs:
                raise BudgetError(
                    f"the graph knows no cost called {name!r}",
                    why=f"it counts {', '.join(sorted(graph.costs)) or 'nothing'}",
                    fix="bound one of those",
                )
            number: Any = value
            if not isinstance(number, Integral):
                found[name] = math.floor(Fraction(repr(float(value))) * graph.cost(name))
            else:
                found[name] = int(value)
        return found


def _check(name: str, value: Any) -> None:
    """Refuse whatever is neither a fraction nor a number."""

    def refuse(why: str) -> BudgetError:
        return BudgetError(f"{name}={value!r} is no budget", why=why, fix=_FIX)

    # These know numpy's numbers as well, without importing numpy.
    whole = isinstance(value, Integral)
    fraction = isinstance(value, Real) and not isinstance(value, Rational)
    if isinstance(value, bool) or not (whole or fraction):
        raise refuse(f"it is a {type(value).__name__}")
    if not math.isfinite(value):
        raise refuse("it is not finite")
    if value <= 0:
        raise refuse("a model that costs nothing computes nothing")
    if whole and value == 1:
        raise refuse("the int 1 may mean all of it or a single one; 1.0 is all of it")
    if not whole and value > 1:
        raise refuse("a float is a fraction of the dense cost, and this is more than all of it")
