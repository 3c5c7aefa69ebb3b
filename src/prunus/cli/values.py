"""How the values of flags are read (what :mod:`argparse` calls types), and files told apart."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from prunus.errors import BudgetError, FileError
from prunus.files import check_target
from prunus.graph.budget import COSTS, Budget

T = TypeVar("T")

IMAGES = ("*.bmp", "*.gif", "*.jpeg", "*.jpg", "*.png", "*.ppm", "*.tif", "*.tiff", "*.webp")
"""Files of a folder of calibration data."""

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*")
"""Files of which a folder with a tokenizer has at least one."""

_PRETRAINED = (*("*config.json", "*.bin", "model*", "*.index.json"), *TOKENIZERS)

FILES = {
    "out": "the smaller model, as safetensors: prunus.load(FILE, build=…) reads it",
    "plan": "which units are kept, as JSON",
    "certificate": "what was compared, and the verdict, as JSON",
    "report": "all of it in one JSON document, the same that --json prints",
    "picture": "the units that are kept and removed, as .png, .svg or .pdf (the extra 'plot')",
}
"""Files that a cut can write, with what they hold."""

SIZES = ("bytes", "activation")
"""Costs of which a bound may have a unit, as ``8MB``."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _reader(
    convert: Callable[[str], T], wanted: str, fits: Callable[[T], bool] = lambda value: True
) -> Callable[[str], T]:
    """A type: what ``convert`` makes of a text, refused where that fails or does not fit."""

    def read(text: str) -> T:
        value: T | None = None
        with suppress(ValueError):
            value = convert(text)
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no {wanted}")
        return value

    return read


def _split(text: str) -> list[str]:
    return text.split(",")


count = _reader(int, "whole number from 1 on", lambda value: value >= 1)
number = _reader(float, "number")
numbers = _reader(
    lambda text: tuple(map(float, _split(text))), "list of numbers; write it as 0.485,0.456,0.406"
)
shape = _reader(
    lambda text: tuple(map(int, _split(text))),
    "shape; write it as 1,3,224,224",
    lambda sizes: min(sizes) >= 1,
)


def by_glob(read: Callable[[str], T], *, single: bool = True) -> Callable[[str], T | dict[str, T]]:
    """Read one value, or several by globs: ``"8"`` or ``"linear=32,conv=8,*=4"``.

    >>> by_glob(int)("8"), by_glob(int)("linear=32,*=4")
    (8, {'linear': 32, '*': 4})
    """

    def parse(text: str) -> T | dict[str, T]:
        if single and "=" not in text:
            return read(text)
        found = {}
        for part in _split(text):
            glob, _, value = part.rpartition("=")
            if not glob:
                raise argparse.ArgumentTypeError(f"{part!r} has no glob; write it as GLOB=VALUE")
            found[glob] = read(value)
        return found

    return parse


def scope(text: str) -> str | list[str]:
    """Read which units compete: a word, or globs.

    >>> scope("global"), scope("backbone.*,head.*")
    ('global', ['backbone.*', 'head.*'])
    """
    return _split(text) if any(sign in text for sign in "*?[,.") else text


def block(text: str) -> int | str:
    """Read the number of blocks to drop, or the name of one."""
    return count(text) if text.lstrip("+-").isdecimal() else text


def bound(cost: str) -> Callable[[str], float | int | str]:
    """The type of a bound on a cost; the budget itself says whether a value is one.

    Bytes may have a unit, and times have one, unless they are fractions.

    >>> bound("macs")("2000000"), bound("bytes")("8MiB"), bound("latency")("12ms")
    (2000000, 8388608, '12ms')
    """

    def read(text: str) -> float | int | str:
        try:
            value = _amount(text, cost)
            Budget(**{cost: value})  # type: ignore[arg-type]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        except TypeError:
            names = ", ".join(COSTS)
            raise argparse.ArgumentTypeError(f"{cost!r} is no cost; costs are {names}") from None
        except BudgetError as error:
            message = f"{text} is no budget: {error.why}; {error.fix}"
            raise argparse.ArgumentTypeError(message) from None
        return value

    return read


def _amount(text: str, cost: str) -> float | int | str:
    with suppress(ValueError):
        return int(text) if text.isascii() and text.isdigit() else float(text)
    if cost == "latency":
        return text
    sized = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?)b", text.strip(), re.IGNORECASE)
    if sized is None or cost not in SIZES or sized[2].lower() not in _UNITS:
        raise ValueError(text)
    return round(float(sized[1]) * _UNITS[sized[2].lower()])


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


def check_files(options: argparse.Namespace) -> None:
    """Refuse files to write that are one file, or one that is read; nothing has been opened yet."""
    written: dict[str, str] = {}
    for name in (*FILES, "log", "dot"):
        path = getattr(options, name, None)
        if path is not None:
            other = written.setdefault(os.path.realpath(path), f"--{name}")
            _tell_apart(other, f"--{name}", path)
    for name, path in _files_read(vars(options)):
        _tell_apart(written.get(os.path.realpath(path), name), name, path)


def _tell_apart(first: str, second: str, path: Path) -> None:
    if first != second:
        raise FileError(
            f"{first} and {second} are one file",
            where=str(path),
            why="one would destroy the other",
            fix="write to a file of its own",
        )


def _files_read(given: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """What a command reads, by the name of the argument."""
    names = {
        "model": "--build" if "file" in given else "MODEL",
        "plan_file": "PLAN",
        "file": "FILE",
    }
    for name in ("plan_file", "file", "model", "data", "metric", "sensitivity", "tokenizer"):
        if given.get(name) is not None:
            for path in _files_of(str(given[name]), images=name == "data"):
                yield names.get(name, f"--{name}"), path


def _files_of(reference: str, *, images: bool) -> Iterator[Path]:
    """A file, that of ``path/to/file.py:FUNCTION``, and of a folder what is read of it."""
    kind, _, rest = reference.partition(":")
    place = Path(rest if kind in ("hf", "yolo") else reference)
    yield from (place, Path(reference.rpartition(":")[0]))
    if place.is_dir():
        patterns = IMAGES if images else _PRETRAINED
        for path in place.rglob("*") if images else place.glob("*"):
            if any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
                yield path
