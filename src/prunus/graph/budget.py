"""Budgets: upper bounds on costs, as fractions or as numbers, of the model or of a scope."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate
from numbers import Integral, Rational, Real
from typing import Any, Protocol

from prunus.errors import BudgetError, checks_options

Timer = str | Callable[..., Any]
"""The name of a clock, or a function of a model that returns seconds."""

IN = " in "
"""Between the name of a cost and the scope in which it is counted: ``"macs in layer3.*"``."""

TIMERS = ("eager", "onnxruntime")

_FIX = "give a float in (0, 1] for a fraction of the dense cost, or an int ≥ 2 for a number"
_WHOLE = {
    "activation": "what is alive at one moment belongs to the whole forward",
    "latency": "what a part takes hangs on what ran before it",
}
"""What only the whole model has, with the reason."""

_TIME_FIX = 'give a float in (0, 1] for a fraction of the dense time, or a time: latency="12ms"'


class Costed(Protocol):
    """What a fraction is taken of: a coupling graph."""

    def cost(self, name: str) -> int:
        """The dense cost of that name."""


@checks_options
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
    latency
        A float in (0, 1] is a fraction of what the dense model takes, a string an absolute time
        with its unit: ``"12ms"``, ``"0.8 s"``, ``"900us"``.  It is met by the clock, within 2 %.
    timer
        What measures latency: ``"eager"`` (PyTorch as it is, the default), ``"onnxruntime"`` (on
        the CPU; the extra ``export``), both on the traced inputs, on as many threads as PyTorch
        has; or a function that is called with a model, dense or pruned (a copy, in eval mode),
        and returns the seconds of a forward, on the device that matters, say.
    within
        Budgets of parts of the model, by a glob over the paths of modules and the names of
        tensors; fractions are of what that part costs.

    Examples
    --------
    >>> Budget(macs=0.5)
    Budget(macs=0.5)
    >>> Budget(params=2_000_000, within={"layer4": Budget(macs=0.3)}).requested
    {'params': 2000000, 'macs in layer4': 0.3}
    >>> Budget(latency="12ms").requested
    {'latency': '12ms'}
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    activation: float | int | None = None
    latency: float | str | None = None
    timer: Timer = "eager"
    within: Mapping[str, Budget] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.within, Mapping):
            raise BudgetError(
                f"within={self.within!r} is no mapping",
                fix='write within={"layer4": Budget(macs=0.3)}, say',
            )
        for scope, inner in self.within.items():
            _check_scope(scope, inner)
        if not self.requested:
            raise BudgetError(
                "the budget bounds nothing",
                why=f"none of {', '.join(COSTS)} was given",
                fix="write Budget(macs=0.5), say",
            )
        self._check_timer()
        for name in COSTS:
            value = getattr(self, name)
            if name == "latency" and isinstance(value, str):
                seconds(value)
            elif value is not None:
                _check(name, value)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in COSTS}
        said = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if self.timer != "eager":
            said.append(f"timer={name_of_timer(self.timer)}")
        if self.within:
            said.append(f"within={dict(self.within)!r}")
        return f"Budget({', '.join(said)})"

    def _check_timer(self) -> None:
        if not callable(self.timer) and self.timer not in TIMERS:
            fix = f"give one of {', '.join(TIMERS)}, or a function that returns seconds"
            raise BudgetError(f"timer={self.timer!r} is no clock", fix=fix)
        if self.timer != "eager" and self.latency is None:
            fix = "write Budget(latency=0.5, timer=…)"
            raise BudgetError("a timer was given, and no bound on latency", fix=fix)

    @property
    def counted(self) -> Budget | None:
        """The bounds that need no clock; None if there are none."""
        only = self.requested.keys() == {"latency"}
        return None if only else replace(self, latency=None, timer="eager")

    @property
    def requested(self) -> dict[str, Any]:
        """The bounds that were given, sorted by name; then those of scopes, ``"macs in GLOB"``."""
        given = {name: getattr(self, name) for name in sorted(COSTS)}
        found = {name: value for name, value in given.items() if value is not None}
        for scope, inner in self.within.items():
            found |= {f"{name}{IN}{scope}": value for name, value in inner.requested.items()}
        return found

    def of_part(self, path: str) -> Budget:
        """The same bounds on a module, but for those that only the whole model has.

        >>> Budget(macs=0.5, latency="2ms").of_part("encoder").requested
        {'latency': '2ms', 'macs in encoder': 0.5}
        """
        if self.params is self.macs is self.bytes is None:
            return self
        own = Budget(params=self.params, macs=self.macs, bytes=self.bytes)
        within = {**self.within, path: own}
        return replace(self, params=None, macs=None, bytes=None, within=within)

    def limits(self, graph: Costed) -> dict[str, int]:
        """The largest allowed value of every bounded cost, by the names of ``requested``.

        A fraction is taken for the decimal number that was written, so 0.29 of 100 is 29.

        Raises
        ------
        BudgetError
            If the graph does not count such a cost, or a scope matches nothing.
        """
        found: dict[str, int] = {}
        for name, value in self.requested.items():
            if name == "latency":
                raise BudgetError(
                    "latency is no cost that can be counted",
                    why="it is met by the clock, plan by plan",
                    fix="prunus.plan(graph, model, budget=…) does that; bound the MACs here",
                )
            dense = graph.cost(name)
            number: Any = value
            if not isinstance(number, Integral):
                found[name] = math.floor(Fraction(repr(float(value))) * dense)
            else:
                found[name] = int(value)
        return found


COSTS = tuple(one.name for one in fields(Budget) if one.name not in ("timer", "within"))
"""What can be bounded."""
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def name_of_timer(timer: Timer) -> str:
    """What a timer is called in messages and in what a plan records."""
    named = timer if isinstance(timer, str) else getattr(timer, "__qualname__", None)
    return str(named or type(timer).__qualname__)


def seconds(text: str) -> float:
    """A time with its unit, in seconds.

    Raises
    ------
    BudgetError
        If it is none, or not positive.

    Examples
    --------
    >>> seconds("12ms"), seconds(".5 us")
    (0.012, 5e-07)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|ms|us|µs|ns)\s*", text)
    if found is None or not float(found[1]):
        raise BudgetError(
            f"latency={text!r} is no time",
            why="it is zero" if found else "it is no positive number with a unit",
            fix='write "12ms", say; units are s, ms, us and ns',
        )
    return float(found[1]) * _UNITS[found[2]]


def _check_scope(scope: str, inner: Any) -> None:
    where = f"within={{{scope!r}: …}}"
    if not isinstance(inner, Budget) or inner.within:
        raise BudgetError(
            f"{inner!r} is no budget of a scope",
            where=where,
            fix="give a Budget that has no scopes of its own",
        )
    for name, why in _WHOLE.items():
        if getattr(inner, name) is not None:
            raise BudgetError(
                f"a scope can't have a bound on {name}",
                where=where,
                why=why,
                fix=f"bound the {name} of the whole model",
            )


def _is_number(value: Any) -> bool:
    """Whether it is whole or a float, of Python or numpy, which need not be imported for that."""
    if isinstance(value, Integral):
        return not isinstance(value, bool)
    return isinstance(value, Real) and not isinstance(value, Rational)


def _check(name: str, value: Any) -> None:
    """Refuse whatever is neither a fraction nor a number."""

    fix = _TIME_FIX if name == "latency" else _FIX

    def refuse(why: str) -> BudgetError:
        return BudgetError(f"{name}={value!r} is no budget", why=why, fix=fix)

    whole = isinstance(value, Integral)
    if not _is_number(value):
        raise refuse(f"it is a {type(value).__name__}")
    if not math.isfinite(value):
        raise refuse("it is not finite")
    for wrong, why in (
        (name == "latency" and whole, "a whole number may be seconds as well as milliseconds"),
        (value <= 0, "a model that costs nothing computes nothing"),
        (whole and value == 1, "the int 1 may mean all of it or a single one; 1.0 is all of it"),
        (not whole and value > 1, "a float is a fraction, and this is more than all of it"),
    ):
        if wrong:
            raise refuse(why)


def is_inside(name: str, scope: str) -> bool:
    """Whether a glob fits the name or that of a module around it.

    >>> is_inside("layer3.0.conv1.weight", "layer?"), is_inside("layer3.0.conv1", "layer3.*")
    (True, True)
    """
    around = accumulate(name.split("."), lambda a, b: f"{a}.{b}")
    return any(fnmatchcase(one, scope) for one in around)


def find_inside(
    names: Collection[str], scope: str, aliases: Mapping[str, str], cost: str
) -> list[str]:
    """The names inside a scope; tied tensors by each of their names.

    Raises
    ------
    BudgetError
        If there are none; it names the ``cost`` that was to be counted.
    """
    tied: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        tied.setdefault(first, []).append(alias)
    found = [
        name for name in names if any(is_inside(one, scope) for one in (name, *tied.get(name, ())))
    ]
    if found:
        return found
    near = difflib.get_close_matches(scope, names, n=3, cutoff=0.3) or list(names)[:3]
    raise BudgetError(
        f"the scope {scope!r} matches nothing that has {cost}",
        why=f"{cost} are counted in {', '.join(map(repr, near))} and others" if near else "",
        fix="give a glob over paths of modules or names of tensors: 'layer3' or 'layer3.*', say",
    )
