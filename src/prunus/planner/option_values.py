"""Fields of an options record: what a value can be, and signature and documentation read off."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, fields
from functools import partial
from inspect import cleandoc
from numbers import Integral, Real
from textwrap import indent
from typing import Any, Literal, TypeVar, get_args

from prunus.errors import PlanError, PrunusError, checks_options
from prunus.graph.budget import Budget

Call = TypeVar("Call", bound=Callable[..., Any])

Globs = str | Sequence[str]
Drop = int | str | Sequence[str]
ScopeName = Literal["global", "local", "isomorphic", "measured"]
Scope = ScopeName | Sequence[str]
Normalise = Literal["mean", "max", "sum", "standardised", "lamp", "none"]


def is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_names(value: Any) -> bool:
    """A glob, or several."""
    return isinstance(value, str) or (
        isinstance(value, Collection)
        and not isinstance(value, (Mapping, bytes))
        and all(isinstance(one, str) for one in value)
    )


def is_drop(value: Any) -> bool:
    whole = is_whole(value) and value >= 1
    return whole or (isinstance(value, (str, Sequence)) and is_names(value))


def is_batches(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and (
        hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    )


def is_anything(value: Any) -> bool:
    return True


def spell_budget(value: Any) -> str:
    """The budget that somebody may have meant who gave something else.

    >>> spell_budget(0.3), spell_budget("40%"), spell_budget({"params": 9000})
    ('prunus.Budget(macs=0.3)', 'prunus.Budget(macs=0.4)', 'prunus.Budget(params=9000)')
    """
    bounds: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {"macs": value}
    try:
        if isinstance(value, str):
            number = float(value.strip().removesuffix("%"))
            bounds = {"macs": number / 100 if "%" in value else number}
        return f"prunus.{Budget(**bounds)}"
    except (PrunusError, TypeError, ValueError):
        return "prunus.Budget(macs=0.5)"


def check_scope(scope: Any, normalise: str | None) -> None:
    """Refuse a scope or a way to normalise that there is not; None is the default way."""
    if normalise is not None and normalise not in get_args(Normalise):
        known = ", ".join(map(repr, get_args(Normalise)))
        raise PlanError(f"normalise={normalise!r} is none of {known}", fix="normalise='mean', say")
    if isinstance(scope, str) and scope not in get_args(ScopeName):
        raise PlanError(
            f"scope={scope!r} is none of {', '.join(map(repr, get_args(ScopeName)))}",
            fix=f"for classes of your own give a list of globs: scope=[{scope!r}], say",
        )
    globs = isinstance(scope, Sequence) and all(isinstance(glob, str) for glob in scope)
    if not scope or not globs:
        raise PlanError(f"scope={scope!r} are no globs", fix="scope=['layer1.*', 'layer4.*'], say")


def check_ratio(option: str, value: Any) -> None:
    """Refuse what is no part of a whole."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise PlanError(f"{option}={value!r} is no ratio", fix="give a number in [0, 1]")


def check_share(option: str, value: Any) -> None:
    """Refuse what is no share of a group's units that can go."""
    check_ratio(option, value)
    if value == 1:
        raise PlanError(f"{option}={value!r} removes everything", fix="give a number in [0, 1)")


def check_count(option: str, number: Any) -> None:
    """Refuse what can't be a number of units."""
    if type(number) is not int or number < 1:
        raise PlanError(f"{option} must be a positive integer, got {number!r}")


def check_each(option: str, values: Any, check: Callable[[str, Any], None]) -> None:
    """Check one value, or every value of those by globs."""
    if not isinstance(values, Mapping):
        return check(option, values)
    for glob, value in values.items():
        if not isinstance(glob, str):
            raise PlanError(f"{glob!r} is no glob", where=f"{option}=", fix="write a string")
        check(f"{option}[{glob!r}]", value)
    return None


def option(
    default: Any,
    fits: Callable[[Any], bool] = is_anything,
    wanted: str = "",
    *,
    recorded: bool = False,
    beside_ratio: Any = ...,
) -> Any:
    """A field of an options record, whose docstring says what it means.

    Parameters
    ----------
    fits, wanted
        Whether a value can be one, unless it is the default; and in words what it must be.
    recorded
        Whether a plan says what it was.
    beside_ratio
        The value that says nothing beside ``ratio``, for an option that shapes what a budget takes.
    """
    metadata = {
        "fits": fits,
        "wanted": wanted,
        "recorded": recorded,
        "beside_ratio": beside_ratio,
    }
    return field(default=default, metadata=metadata)


def takes_options(record: type[Any]) -> Callable[[Call], Call]:
    """Let a public function take the options of a record: its signature, checks and docstring.

    The parameter ``**options`` becomes the fields of the record in the signature, an unknown option
    is refused before anything else, and ``**options`` in the docstring becomes what they mean.
    """

    def decorate(call: Call) -> Call:
        checked = partial(checks_options, options_of=record)(call)
        if call.__doc__:  # there is none under python -OO
            checked.__doc__ = call.__doc__.replace(
                "    **options\n", indent(describe_options(record), "    ") + "\n"
            )
        return checked

    return decorate


def describe_options(record: type[Any]) -> str:
    """The options as the section of a numpydoc docstring."""
    texts = texts_of(record)
    parts = []
    for one in fields(record):
        text = indent(texts.get(one.name, ""), "    ")
        parts.append(f"{one.name} : {one.type}, default {one.default!r}\n{text}")
    return "\n".join(parts)


def texts_of(record: type[Any]) -> dict[str, str]:
    """What each option means, by its name, as the docstring of the record says.

    The first paragraph of each is the help of its flag on the command line.
    """
    found: dict[str, str] = {}
    for one in reversed(record.__mro__):
        section = cleandoc(one.__doc__ or "").partition("Attributes\n----------\n")[2]
        parts = re.split(r"^(\w+)\n", section, flags=re.MULTILINE)
        found |= {name: cleandoc(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return found
