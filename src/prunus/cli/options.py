"""Options that verbs share, and how their values are read."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from prunus import __version__

MODEL_HELP = """\
MODEL is one of
  zoo:NAME            a model of the zoo that ships with Prunus
  timm:NAME           a model of timm (the extra 'timm')
  path/to/file.py:F   what the function F() in that file returns; where the file also has
                      example_inputs(), that gives the forward's arguments (a tensor, a tuple,
                      or a dict of keyword arguments)
"""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what belongs to it."""
    parser.add_argument("model", metavar="MODEL", help="zoo:NAME, timm:NAME or file.py:FUNCTION")
    parser.add_argument(
        "--pretrained", action="store_true", help="with trained weights (zoo and timm)"
    )
    parser.add_argument(
        "--input-shape",
        metavar="N,N,…",
        type=shape,
        action="append",
        help="shape of the example input, random numbers; once for each argument of the forward",
    )
    parser.add_argument(
        "--outputs",
        metavar="GLOB",
        action="append",
        help="outputs that keep their shape (default: all but caches, hidden states, attentions)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything that is random (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def shape(text: str) -> tuple[int, ...]:
    """Read ``"1,3,224,224"``."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it as 1,3,224,224")
    return sizes


def count(text: str) -> int:
    """Read a whole number from 1 on."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return number


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


def versions() -> dict[str, str]:
    """What a report's numbers were made with."""
    import torch

    python = platform.python_version()
    return {"prunus": __version__, "torch": str(torch.__version__), "python": python}
