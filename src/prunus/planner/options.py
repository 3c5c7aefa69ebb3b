"""The options of a plan, checked at the edge: values that are none, and options that contradict.

It happens before anything is traced or read, so that an option is refused whether or not the rest
of the call would ever look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from prunus.errors import PlanError
from prunus.graph.budget import Budget
from prunus.planner.alignment import check_count
from prunus.planner.allocate import check_ratio, check_scope, check_share

_NO_EFFECT: Mapping[str, Any] = {
    "scope": "local",
    "normalise": None,
    "min_width": 1,
    "max_ratio": 1.0,
    "round_to": 1,
    "include": None,
    "exclude": (),
}
"""Options that shape what a budget takes, with the values that say nothing beside a ratio."""


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values that an option can't have, and options that contradict one another.

    Parameters
    ----------
    options
        All options of :func:`prunus.plan`, by name.
    defaults
        Their values where nothing is said.

    Raises
    ------
    PlanError
        The message names the option, and says why it is refused.
    """
    for name, (fits, wanted) in _KINDS.items():
        value = options[name]
        if value is not defaults[name] and not fits(value):
            raise PlanError(f"{name} must be {wanted}; got {value!r}")
    check_scope(options["scope"], options["normalise"])
    _check_each("min_width", options["min_width"], check_count)
    if options["max_ratio"] is not None:
        _check_each("max_ratio", options["max_ratio"], check_ratio)
    if options["round_to"] not in (None, "latency"):
        _check_each("round_to", options["round_to"], check_count)
    _check_each("ratios", options["ratios"] or {}, check_share)
    _check_amount(options)
    if options["ratio"] is not None:
        _check_beside_ratio(options, defaults)


def _check_each(option: str, values: Any, check: Callable[[str, Any], None]) -> None:
    """Check one value, or every value of those by globs."""
    if not isinstance(values, Mapping):
        return check(option, values)
    for glob, value in values.items():
        if not isinstance(glob, str):
            raise PlanError(f"{glob!r} is no glob", where=f"{option}=", fix="write a string")
        check(f"{option}[{glob!r}]", value)
    return None


def _check_amount(options: Mapping[str, Any]) -> None:
    """Refuse a call that doesn't say how much to remove, or says it twice."""
    ratio, drop = options["ratio"], options["drop"]
    given = {"a budget": options["budget"], "ratios": options["ratios"]}
    several = [name for name, value in given.items() if value is not None]
    fix = "give budget=Budget(macs=0.5), say, or ratio=0.3, or ratios={'layer3.*': 0.3}"
    why = "a ratio is taken from every group, whatever it costs"
    if ratio is not None and several:
        raise PlanError(f"{' and '.join(several)} and a ratio were given", why=why, fix=fix)
    if ratio is None and not several and not isinstance(drop, int) and not drop:
        raise PlanError("nothing says how much to remove", why=why, fix=fix)
    if ratio is not None and not 0 < ratio < 1:
        raise PlanError(
            f"a ratio of {ratio} removes nothing or everything",
            fix="give a number between 0 and 1: the share of units that every group loses",
        )


def _check_beside_ratio(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """A ratio is one of every group: what shapes a budget's choice would change nothing."""

    def says_nothing(name: str, value: Any) -> bool:
        same: bool = value == defaults[name] or value == _NO_EFFECT[name]
        return same or (name == "exclude" and not value)

    given = [name for name in _NO_EFFECT if not says_nothing(name, options[name])]
    if given:
        raise PlanError(
            f"{', '.join(given)} can't be combined with ratio=",
            why="a ratio is taken from every group alike",
            fix="give a budget, or ratios={'layer3.*': 0.3} of the groups that are meant; "
            "hold=[…] names groups that lose nothing",
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    """A glob, or several."""
    return isinstance(value, str) or (
        isinstance(value, Collection)
        and not isinstance(value, (Mapping, bytes))
        and all(isinstance(one, str) for one in value)
    )


def _is_drop(value: Any) -> bool:
    whole = _is_whole(value) and value >= 1
    return whole or (isinstance(value, (str, Sequence)) and _is_names(value))


def _is_batches(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and (
        hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    )


_GLOBS = "a glob over names of groups and their tensors, or a list of globs"

_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "budget": (lambda value: isinstance(value, Budget), "a Budget, as prunus.Budget(macs=0.5)"),
    "ratio": (_is_real, "a number between 0 and 1"),
    "ratios": (lambda value: isinstance(value, Mapping), "a mapping, as {'layer3.*': 0.3}"),
    "importance": (
        lambda value: isinstance(value, str) or callable(value),
        "a name, as 'l2', or a function of a group and a context",
    ),
    "data": (_is_batches, "an iterable of batches, as a DataLoader is"),
    "statistics": (lambda value: hasattr(value, "unit_count"), "what prunus.collect returns"),
    "loss": (callable, "a function of the outputs and a batch"),
    "include": (_is_names, _GLOBS),
    "exclude": (_is_names, _GLOBS),
    "hold": (
        lambda value: not isinstance(value, str) and _is_names(value),
        "a list of names of groups",
    ),
    "drop": (_is_drop, "an int ≥ 1, or the names of blocks as in graph.blocks"),
    "latency": (lambda value: hasattr(value, "predict"), "what prunus.measure returns"),
    "protect_ends": (_is_bool, "True or False"),
    "exchange": (_is_bool, "True or False"),
    "seed": (_is_whole, "an int"),
}
"""What a value must be, unless it is the default."""
