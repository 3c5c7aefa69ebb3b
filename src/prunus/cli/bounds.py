"""The budget on the command line: bounds of the model and of parts of it, and shares of groups."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prunus.cli.values import count

if TYPE_CHECKING:
    from prunus.graph.budget import Budget

T = TypeVar("T")

COUNTS = ("macs", "params")
SIZES = ("bytes", "activation")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def add_budget_options(group: Any) -> None:
    """Bounds of every cost, of the whole model and of parts, and fixed ratios."""
    from prunus.graph.budget import TIMERS

    text = "upper bound: a fraction of the dense cost, as 0.5, or a number, as"
    for name in COUNTS:
        group.add_argument(f"--{name}", metavar="N", type=count_bound, help=f"{text} 2000000")
    for name in SIZES:
        group.add_argument(f"--{name}", metavar="N", type=size_bound, help=f"{text} 8MB or 8MiB")
    group.add_argument(
        "--latency",
        metavar="N|TIME",
        type=time_bound,
        help="a fraction of the time that the dense model takes on this machine, as 0.5, or a "
        "time, as 12ms: smaller models are timed in turn with the dense one",
    )
    group.add_argument(
        "--backend",
        default="eager",
        choices=TIMERS,
        help="what runs the models that are timed (default: eager; onnxruntime needs the extra "
        "'export')",
    )
    group.add_argument(
        "--threads", metavar="N", type=count, help="of PyTorch, and of the models that are timed"
    )
    group.add_argument(
        "--within",
        metavar=("GLOB", "COST=N"),
        nargs=2,
        action="append",
        default=[],
        help="upper bound for the modules and tensors that the glob fits, whatever is inside "
        "included, as: --within layer4 macs=0.3; may be repeated",
    )
    group.add_argument(
        "--ratios",
        metavar="GLOB=R,…",
        type=shares,
        help="the share of its units that a group loses, exactly, by globs over names of groups "
        "and their tensors",
    )


def budget_of(options: argparse.Namespace) -> Budget | None:
    """The budget; None where ratios, a table or blocks to drop alone say how much goes.

    Raises
    ------
    PlanError
        If there is none of them.
    """
    from prunus.errors import PlanError
    from prunus.graph.budget import Budget

    bounds: dict[str, Any] = {
        n: v for n in (*COUNTS, *SIZES, "latency") if (v := getattr(options, n)) is not None
    }
    scopes: dict[str, dict[str, Any]] = {}
    for glob, text in options.within:
        name, equals, value = text.partition("=")
        if not equals or name not in (*COUNTS, *SIZES):
            raise PlanError(
                f"--within {glob} {text} bounds no cost",
                why=f"costs are {', '.join((*COUNTS, *SIZES))}",
                fix=f"write --within {glob} macs=0.3, say",
            )
        try:
            bound = size_bound(value) if name in SIZES else count_bound(value)
        except argparse.ArgumentTypeError as error:
            raise PlanError(str(error), where=f"--within {glob} {text}") from None
        scopes.setdefault(glob, {})[name] = bound
    if options.latency is not None:
        bounds["timer"] = options.backend
    if bounds or scopes:
        return Budget(**bounds, within={g: Budget(**inner) for g, inner in scopes.items()})
    if options.ratios is None and options.sensitivity is None and not options.drop:
        names = [f"--{name}" for name in (*COUNTS, *SIZES, "latency")]
        raise PlanError(f"give a budget: {', '.join(names)}", fix="--macs 0.5, say")
    return None


def count_bound(text: str) -> float | int:
    """Read a bound, and let the budget itself say whether it is one."""
    try:
        value = int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    return _checked(text, value)


def size_bound(text: str) -> float | int:
    """Read a bound on bytes, which may have a unit: ``"8MB"``, ``"1.5 GiB"``.

    >>> size_bound("8 MB"), size_bound("8MiB"), size_bound("0.5")
    (8000000, 8388608, 0.5)
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?)b", text.strip(), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None:
        return count_bound(text)
    return _checked(text, round(float(found[1]) * unit))


def time_bound(text: str) -> float | str:
    """Read a bound on latency: a fraction, or a time with its unit."""
    from prunus.errors import BudgetError
    from prunus.graph.budget import Budget

    try:
        value: float | str = float(text)
    except ValueError:
        value = text
    try:
        Budget(latency=value)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(f"{text} is no budget: {error.why}; {error.fix}") from None
    return value


def _checked(text: str, value: float | int) -> float | int:
    from prunus.errors import BudgetError
    from prunus.graph.budget import Budget

    try:
        Budget(macs=value)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(f"{text} is no budget: {error.why}; {error.fix}") from None
    return value


def by_glob(read: Callable[[str], T]) -> Callable[[str], T | dict[str, T]]:
    """Read one value, or several by globs: ``"8"`` or ``"linear=32,conv=8,*=4"``."""

    def parse(text: str) -> T | dict[str, T]:
        if "=" not in text:
            return read(text)
        found = {}
        for part in text.split(","):
            glob, _, value = part.rpartition("=")
            if not glob:
                raise argparse.ArgumentTypeError(f"{part!r} has no glob; write it as GLOB=VALUE")
            found[glob] = read(value)
        return found

    return parse


def shares(text: str) -> dict[str, float]:
    """Read ``"layer3.*=0.3,layer4.*=0.5"``."""
    found = by_glob(_share)(text)
    if isinstance(found, float):
        raise argparse.ArgumentTypeError(f"{text!r} has no glob; write it as 'GLOB=R'")
    return found


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in [0, 1)")
    return number
