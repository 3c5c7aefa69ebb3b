"""How the values of options are read: what :mod:`argparse` calls types."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prunus.errors import FileError
from prunus.files import check_target


def shape(text: str) -> tuple[int, ...]:
    """Read ``"1,3,224,224"``."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it as 1,3,224,224")
    return sizes


def numbers(text: str) -> tuple[float, ...]:
    """Read ``"0.485,0.456,0.406"``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is no list of numbers; write it as 0.485,0.456,0.406"
        raise argparse.ArgumentTypeError(message) from None


def count(text: str) -> int:
    """Read a whole number from 1 on."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return number


def block(text: str) -> int | str:
    """Read the number of blocks to drop, or the name of one."""
    if text.lstrip("+-").isdecimal():
        return count(text)
    return text


def scope(text: str) -> str | list[str]:
    """Read which units compete: a word, or globs.

    >>> scope("global"), scope("backbone.*,head.*")
    ('global', ['backbone.*', 'head.*'])
    """
    if text in ("local", "isomorphic", "global"):
        return text
    if not any(sign in text for sign in "*?[,."):
        raise argparse.ArgumentTypeError(f"{text!r} is not local, isomorphic, global, or a glob")
    return text.split(",")


def ratio(text: str) -> float:
    """Read a number in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in (0, 1]")
    return number


def axis(text: str) -> Any:
    """Read ``"layer1.0.conv1.weight[0]"``; without brackets it is dim 0."""
    from prunus.graph.axis import Axis

    tensor, bracket, dim = text.removesuffix("]").partition("[")
    if bracket and not (dim.isascii() and dim.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no axis; write it as conv1.weight[0]")
    return Axis(tensor, int(dim or 0))


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


def stream(text: str) -> Path:
    """A path that can be written to, be it a file, a pipe or a device."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def old_file(text: str) -> Path:
    """A path that can be read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path
