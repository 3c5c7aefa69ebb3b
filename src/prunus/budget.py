"""Budgets: upper bounds on costs, as fractions of the dense cost or as absolute numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any

from prunus.errors import BudgetError
from prunus.graph.scope import IN

if TYPE_CHECKING:
    from prunus.graph.coupling import CouplingGraph

_FIX = "give a float in (0, 1] for a fraction of the dense cost, or an int ≥ 2 for a number"


@dataclass(frozen=True, repr=False)
class Budget:
    """What the pruned model may cost at most; several bounds may be given and all will hold.

    Parameters
    ----------
    params, macs
        A float in (0, 1] is a fraction of the dense cost, an int ≥ 2 an absolute number.
    bytes
        Of parameters and buffers, as they are stored.
    activation
        The most bytes of tensors that are alive at one moment of the forward, inputs included,
        parameters and buffers not, for the traced inputs, batch included.  What a kernel needs
        while it runs is not seen: attention takes the kernel of the traced model, which PyTorch
        may exchange for plain matrix products where values get narrower than queries.
        ``nn.MultiheadAttention`` is taken for the equivalent that it becomes when it is cut.
    within
        Budgets of parts of the model, by a glob over the paths of modules and the names of
        tensors; fractions are of what that part costs.

    Examples
    --------
    >>> Budget(macs=0.5)
    Budget(macs=0.5)
    >>> Budget(params=2_000_000, within={"layer4": Budget(macs=0.3)}).requested
    {'params': 2000000, 'macs in layer4': 0.3}
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    activation: float | int | None = None
    within: Mapping[str, Budget] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.within, Mapping):
            raise BudgetError(
                f"within={self.within!r} is no mapping",
                fix='write within={"layer4": Budget(macs=0.3)}, say',
            )
        inner: Any
        for scope, inner in self.within.items():
            if not isinstance(inner, Budget) or inner.within:
                raise BudgetError(
                    f"{inner!r} is no budget of a scope",
                    where=f"within={{{scope!r}: …}}",
                    fix="give a Budget that has no scopes of its own",
                )
            if inner.activation is not None:
                raise BudgetError(
                    "a scope can't have a bound on activation",
                    where=f"within={{{scope!r}: …}}",
                    why="what is alive at one moment belongs to the whole forward",
                    fix="bound the activation of the whole model",
                )
        if not self.requested:
            raise BudgetError(
                "the budget bounds nothing",
                why=f"none of {', '.join(COSTS)} was given",
                fix="write Budget(macs=0.5), say",
            )
        for name in COSTS:
            if getattr(self, name) is not None:
                _check(name, getattr(self, name))

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in COSTS}
        said = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if self.within:
            said.append(f"within={dict(self.within)!r}")
        return f"Budget({', '.join(said)})"

    @property
    def requested(self) -> dict[str, float | int]:
        """The bounds that were given, sorted by name; then those of scopes, ``"macs in GLOB"``."""
        given = {name: getattr(self, name) for name in sorted(COSTS)}
        found = {name: value for name, value in given.items() if value is not None}
        for scope, inner in self.within.items():
            found |= {f"{name}{IN}{scope}": value for name, value in inner.requested.items()}
        return found

    def limits(self, graph: CouplingGraph) -> dict[str, int]:
        """The largest allowed value of every bounded cost, by the names of ``requested``.

        A fraction is taken for the decimal number that was written, so 0.29 of 100 is 29.

        Raises
        ------
        BudgetError
            If the graph does not count such a cost, or a scope matches nothing.
        """
        found: dict[str, int] = {}
        for name, value in self.requested.items():
            dense = graph.cost(name)
            number: Any = value
            if not isinstance(number, Integral):
                found[name] = math.floor(Fraction(repr(float(value))) * dense)
            else:
                found[name] = int(value)
        return found


COSTS = tuple(one.name for one in fields(Budget) if one.name != "within")
"""What can be bounded."""


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
