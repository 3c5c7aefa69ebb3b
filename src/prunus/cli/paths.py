"""Which files a command reads and writes: refused where one would destroy another."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prunus.cli.flags import FILES
from prunus.errors import FileError

IMAGES = ("*.bmp", "*.gif", "*.jpeg", "*.jpg", "*.png", "*.ppm", "*.tif", "*.tiff", "*.webp")
"""Files of a folder of calibration data."""

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*")
"""Files of which a folder with a tokenizer has at least one."""

_PRETRAINED = (*("*config.json", "*.bin", "model*", "*.index.json"), *TOKENIZERS)
_OUTPUTS = (*FILES, "log", "dot")


def check_files(options: argparse.Namespace) -> None:
    """Refuse files to write that are one file, or one that is read; nothing has been opened yet."""
    seen: dict[str, str] = {}
    for name in _OUTPUTS:
        path = getattr(options, name, None)
        if path is not None:
            other = seen.setdefault(os.path.realpath(path), f"--{name}")
            if other != f"--{name}":
                raise _one_file(other, f"--{name}", path)
    for name, path in _files_read(options):
        first = seen.get(os.path.realpath(path))
        if first is not None:
            raise _one_file(first, name, path)


def _one_file(first: str, second: str, path: str | Path) -> FileError:
    return FileError(
        f"{first} and {second} are one file",
        where=str(path),
        why="one would destroy the other",
        fix="write to a file of its own",
    )


def _files_read(options: argparse.Namespace) -> Iterator[tuple[str, str | Path]]:
    """What a command reads, by the name of the argument."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name, attribute in (("PLAN", "plan_file"), ("FILE", "file"), ("A", "a"), ("B", "b")):
        if attribute in given:
            yield name, given[attribute]
    if "model" in given:
        model = "--build" if "file" in given else "MODEL"
        yield from ((model, path) for path in _files_of_model(given["model"]))
    yield from _data_read(given)


def _data_read(given: Mapping[str, Any]) -> Iterator[tuple[str, str | Path]]:
    """What is read for calibration and metrics."""
    for name in [name for name in ("data", "metric", "sensitivity") if name in given]:
        reference = str(given[name])
        yield from ((f"--{name}", path) for path in (reference, *_python_file(reference)))
    if "data" in given:
        yield from (("--data", path) for path in _inside(Path(given["data"]), IMAGES, deep=True))
    if "tokenizer" in given:
        found = _inside(Path(given["tokenizer"]), _PRETRAINED)
        yield from (("--tokenizer", path) for path in found)


def _files_of_model(reference: str) -> Iterable[str | Path]:
    """The files that a model is built from."""
    kind, _, rest = reference.partition(":")
    if kind == "hf":
        return _inside(Path(rest), _PRETRAINED)
    return [rest] if kind == "yolo" else _python_file(reference)


def _python_file(reference: str) -> list[str]:
    """The file of ``path/to/file.py:FUNCTION``, also where the function is missing."""
    return [part for part in (reference, reference.rpartition(":")[0]) if part.endswith(".py")]


def _inside(folder: Path, patterns: Sequence[str], *, deep: bool = False) -> Iterator[Path]:
    for path in folder.rglob("*") if deep else folder.glob("*"):
        if any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
            yield path
