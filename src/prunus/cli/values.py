"""How the values of flags are read: what :mod:`argparse` calls types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from prunus.errors import BudgetError, FileError
from prunus.files import check_target
from prunus.graph.budget import Budget
from prunus.planner.option_values import ScopeName

T = TypeVar("T")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _refuse(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is no {wanted}")


def number(text: str, wanted: str = "number") -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise _refuse(text, wanted) from None


def numbers(text: str) -> tuple[float, ...]:
    """Read ``"0.485,0.456,0.406"``."""
    wanted = "list of numbers; write it as 0.485,0.456,0.406"
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise _refuse(text, wanted) from None


def count(text: str) -> int:
    """Read a whole number from 1 on."""
    found = int(text) if text.isascii() and text.isdigit() else 0
    if found < 1:
        raise _refuse(text, "whole number from 1 on")
    return found


def shape(text: str) -> tuple[int, ...]:
    """Read ``"1,3,224,224"``."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise _refuse(text, "shape; write it as 1,3,224,224")
    return sizes


def ratio(text: str) -> float:
    """Read a number in (0, 1]."""
    found = number(text, "number in (0, 1]")
    if not 0 < found <= 1:
        raise _refuse(text, "number in (0, 1]")
    return found


def share(text: str) -> float:
    """Read a number in [0, 1)."""
    found = number(text, "number in [0, 1)")
    if not 0 <= found < 1:
        raise _refuse(text, "number in [0, 1)")
    return found


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
    found = by_glob(share)(text)
    if isinstance(found, float):
        raise argparse.ArgumentTypeError(f"{text!r} has no glob; write it as 'GLOB=R'")
    return found


def scope(text: str) -> str | list[str]:
    """Read which units compete: a word, or globs.

    >>> scope("global"), scope("backbone.*,head.*")
    ('global', ['backbone.*', 'head.*'])
    """
    if text in get_args(ScopeName):
        return text
    if not any(sign in text for sign in "*?[,."):
        raise argparse.ArgumentTypeError(f"{text!r} is not local, isomorphic, global, or a glob")
    return text.split(",")


def block(text: str) -> int | str:
    """Read the number of blocks to drop, or the name of one."""
    return count(text) if text.lstrip("+-").isdecimal() else text


def bound(text: str) -> float | int:
    """Read a bound on a cost, and let the budget itself say whether it is one."""
    value = int(text) if text.isascii() and text.isdigit() else number(text)
    return _checked(text, value)


def size_bound(text: str) -> float | int:
    """Read a bound on bytes, which may have a unit: ``"8MB"``, ``"1.5 GiB"``.

    >>> size_bound("8 MB"), size_bound("8MiB"), size_bound("0.5")
    (8000000, 8388608, 0.5)
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?)b", text.strip(), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None:
        return bound(text)
    return _checked(text, round(float(found[1]) * unit))


def time_bound(text: str) -> float | str:
    """Read a bound on latency: a fraction, or a time with its unit."""
    try:
        return _checked(text, float(text), "latency")
    except ValueError:
        return _checked(text, text, "latency")


def _checked(text: str, value: T, cost: str = "macs") -> T:
    try:
        Budget(**{cost: value})  # type: ignore[arg-type]
    except BudgetError as error:
        raise argparse.ArgumentTypeError(f"{text} is no budget: {error.why}; {error.fix}") from None
    return value


def axis(text: str) -> Any:
    """Read ``"layer1.0.conv1.weight[0]"``; without brackets it is dim 0."""
    from prunus.graph.axis import Axis

    tensor, bracket, dim = text.removesuffix("]").partition("[")
    if bracket and not (dim.isascii() and dim.isdigit()):
        raise _refuse(text, "axis; write it as conv1.weight[0]")
    return Axis(tensor, int(dim or 0))


def old_file(text: str) -> Path:
    """A path that can be read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def stream(text: str) -> Path:
    """A path that can be written to, be it a file, a pipe or a device."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def new_file(text: str) -> Path:
    """A path that can be written: found out before the work, not after it."""
    path = stream(text)
    try:
        check_target(path)
    except FileError as error:
        raise argparse.ArgumentTypeError(error.what) from None
    return path


def new_picture(text: str) -> Path:
    """A path for a picture; its ending says of what kind."""
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        message = f"{text} is no picture: give a name that ends in .png, .svg or .pdf"
        raise argparse.ArgumentTypeError(message)
    return new_file(text)
