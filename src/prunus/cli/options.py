"""Options that verbs share, and what they have in common beside these."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prunus import __version__
from prunus.cli import values
from prunus.cli.bounds import add_budget_options, by_glob
from prunus.errors import FileError

MODEL_HELP = """\
MODEL is one of
  zoo:NAME            a model of the zoo that ships with Prunus
  timm:NAME           a model of timm (the extra 'timm')
  hf:FOLDER           a folder with config.json and *.safetensors, as save_pretrained() writes it,
                      or *.bin with --trust-pickle (the extra 'hf'); its code is never run
  yolo:FILE           a .yaml of ultralytics (the extra 'yolo'), or a .pt file with --trust-pickle
  path/to/file.py:F   what the function F() in that file returns; where the file also has
                      example_inputs(), that gives the forward's arguments (a tensor, a tuple,
                      or a dict of keyword arguments)
"""

DATA_HELP = """\
DATA is one of
  FOLDER              of images, also in folders below it (the extra 'images'): each is resized and
                      cropped to the size of the example input, scaled to 0..1, and normalised
                      with --mean and --std (by default what the model came with, if anything)
  FILE.npz            with the array 'inputs', prepared as the model wants it
  FILE.txt            one text a line (the extra 'hf'), with the tokenizer in --tokenizer FOLDER or
                      beside an hf: model
  path/to/file.py:F   what the function F() returns: an iterable of batches
"""

IMAGES = ("*.bmp", "*.gif", "*.jpeg", "*.jpg", "*.png", "*.ppm", "*.tif", "*.tiff", "*.webp")
"""Files of a folder of calibration data."""

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*")
"""Files of which a folder with a tokenizer has at least one."""

_PRETRAINED = (*("*config.json", "*.bin", "model*", "*.index.json"), *TOKENIZERS)
_OUTPUTS = ("out", "plan", "certificate", "report", "picture", "log", "dot")


def add_model_options(parser: argparse.ArgumentParser, *, flag: bool = False) -> None:
    """MODEL, and what belongs to it; under the name ``--build`` if it is a flag."""
    text = "zoo:NAME, timm:NAME, hf:FOLDER, yolo:FILE or file.py:FUNCTION"
    if flag:
        parser.add_argument("--build", metavar="MODEL", dest="model", required=True, help=text)
    else:
        parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument(
        "--pretrained", action="store_true", help="with trained weights (zoo and timm)"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read weights from pickles, which can run any code: only from people you trust",
    )
    parser.add_argument(
        "--input-shape",
        metavar="N,N,…",
        type=values.shape,
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
    add_answer_options(parser)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """How a verb answers."""
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument(
        "--log", metavar="FILE", type=values.stream, help="write what happens, as JSON lines"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Calibration data, and how it is prepared."""
    group = parser.add_argument_group("calibration data")
    group.add_argument(
        "--data", metavar="DATA", help="batches for batch norms and importances; see below"
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=values.count,
        default=512,
        help="samples of it that are used: the first ones, in whole batches (default: 512)",
    )
    group.add_argument(
        "--mean", metavar="R,R,…", type=values.numbers, help="of the images' channels"
    )
    group.add_argument(
        "--std", metavar="R,R,…", type=values.numbers, help="of the images' channels"
    )
    group.add_argument("--tokenizer", metavar="FOLDER", help="for a text file")


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """What to remove."""
    group = parser.add_argument_group("what to remove")
    add_budget_options(group)
    group.add_argument(
        "--drop",
        metavar="N|NAME",
        type=values.block,
        action="append",
        default=[],
        help="drop residual blocks: how many, those of least influence, or one by its module path, "
        "which may be repeated; then a bound is not needed",
    )
    group.add_argument(
        "--sensitivity",
        metavar="FILE",
        type=values.old_file,
        help="a table of 'prunus sensitivity': what a group loses costs the metric as little as "
        "what any other loses, just enough for the bounds; without bounds it is what the table's "
        "--tolerance found",
    )
    add_importance(group)
    group.add_argument(
        "--scope",
        default="local",
        metavar="SCOPE|GLOB,…",
        type=values.scope,
        help="which units compete: those of one group (local, the default), of groups of one shape "
        "(isomorphic), all (global), or of the groups that one of your globs fits: "
        "'backbone.*,head.*'",
    )
    group.add_argument(
        "--normalise",
        choices=("mean", "max", "sum", "standardised", "lamp", "none"),
        help="how scores of different groups are made comparable (default: mean; none for obs in "
        "--scope global)",
    )
    text = "one number, or numbers by globs over names of groups and their tensors: GLOB=N,…"
    group.add_argument(
        "--round-to",
        metavar="N",
        type=by_glob(values.count),
        help="widths are multiples of it; a number, or numbers by kind of layer and by globs: "
        "linear=32,conv=8,head.*=1,*=4 (default: "
        "8 for channels and FFNs of 32 and more, less where a step of 8 would miss a bound by "
        "more than 2 %%; 1 rounds nothing)",
    )
    group.add_argument(
        "--min-width",
        default=1,
        metavar="N",
        type=by_glob(values.count),
        help=f"units every group keeps; {text}",
    )
    group.add_argument(
        "--max-ratio",
        metavar="R",
        type=by_glob(values.ratio),
        help=f"the largest share of its units that a group may lose; {text} (default: 0.8 for "
        "bounds in --scope global, else 1)",
    )
    add_group_globs(group)


def add_importance(group: argparse._ActionsContainer) -> None:
    """Which units of a group go first."""
    group.add_argument(
        "--importance",
        default="l2",
        metavar="NAME",
        help="score of a unit, of the weights: l1, l2 (default), lamp, fpgm, bn_scale, random; of "
        "calibration data: taylor, fisher, head_gradient, activation, wanda, flap, obs",
    )


def add_group_globs(group: argparse._ActionsContainer) -> None:
    """Which groups are meant."""
    text = "groups, by globs over their names and those of their tensors; may be repeated"
    group.add_argument("--include", metavar="GLOB", action="append", help=f"only these {text}")
    group.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[], help=f"not these {text}"
    )


def add_files(parser: argparse.ArgumentParser, files: Sequence[tuple[str, str]]) -> None:
    """Files to write, by the option's name and what it says."""
    group = parser.add_argument_group("files to write")
    for name, text in files:
        kind = values.new_picture if name == "picture" else values.new_file
        group.add_argument(f"--{name}", metavar="FILE", type=kind, help=text)


def check_files(options: argparse.Namespace) -> None:
    """Refuse files to write that are one file, or one that is read; nothing has been opened yet."""
    seen: dict[str, str] = {}
    for name in _OUTPUTS:
        path = getattr(options, name, None)
        if path is not None:
            _claim(seen, f"--{name}", path)
    for name, path in _files_read(options):
        other = seen.get(os.path.realpath(path))
        if other is not None:
            raise _one_file(other, name, path)


def _claim(seen: dict[str, str], name: str, path: Path) -> None:
    other = seen.setdefault(os.path.realpath(path), name)
    if other != name:
        raise _one_file(other, name, path)


def _one_file(first: str, second: str, path: str | Path) -> FileError:
    return FileError(
        f"{first} and {second} are one file",
        where=str(path),
        why="one would destroy the other",
        fix="write to a file of its own",
    )


def _files_read(options: argparse.Namespace) -> Iterator[tuple[str, str | Path]]:
    """What a command reads, by the name of the argument."""
    for name, attribute in (("PLAN", "plan_file"), ("FILE", "file"), ("A", "a"), ("B", "b")):
        if getattr(options, attribute, None) is not None:
            yield name, getattr(options, attribute)
    if not hasattr(options, "model"):
        return
    model = "--build" if hasattr(options, "file") else "MODEL"
    kind, _, rest = options.model.partition(":")
    if kind == "hf":
        yield from ((model, path) for path in _inside(Path(rest), _PRETRAINED))
    elif kind == "yolo":
        yield model, rest
    else:
        yield from ((model, path) for path in _python_file(options.model))
    data: str | None = getattr(options, "data", None)
    if data is not None:
        yield from (("--data", path) for path in (data, *_python_file(data)))
        yield from (("--data", path) for path in _inside(Path(data), IMAGES, deep=True))
    if getattr(options, "sensitivity", None) is not None:
        yield "--sensitivity", options.sensitivity
    metric: str | None = getattr(options, "metric", None)
    if metric is not None:
        yield from (("--metric", path) for path in _python_file(metric))
    tokenizer = getattr(options, "tokenizer", None)
    if tokenizer is not None:
        yield from (("--tokenizer", path) for path in _inside(Path(tokenizer), _PRETRAINED))


def _python_file(reference: str) -> list[str]:
    """The file of ``path/to/file.py:FUNCTION``, also where the function is missing."""
    return [part for part in (reference, reference.rpartition(":")[0]) if part.endswith(".py")]


def _inside(folder: Path, patterns: Sequence[str], *, deep: bool = False) -> Iterator[Path]:
    for path in folder.rglob("*") if deep else folder.glob("*"):
        if any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
            yield path


@contextmanager
def follow(options: argparse.Namespace, count: int) -> Iterator[Callable[..., None]]:
    """Progress on stderr, each new step in the log as well."""
    from prunus.report.console import follow_steps

    with follow_steps(count) as step:

        def logged(description: str, *, same: bool = False) -> None:
            if not same:
                options.journal.write("step", name=description)
            step(description, same=same)

        yield logged


def head(options: argparse.Namespace) -> dict[str, Any]:
    """What every JSON document begins with."""
    given = {name: getattr(options, name) for name in ("model", "seed") if hasattr(options, name)}
    return {"command": options.command, "versions": versions(), **given}


def answer(options: argparse.Namespace, document: dict[str, Any], show: Callable[[], None]) -> None:
    """Print the result, as JSON if that was asked for; it goes into the log as well."""
    from prunus.report.console import show_json
    from prunus.report.documents import to_json

    if options.log:
        import json

        options.journal.write("result", document=json.loads(to_json(document)))
    if options.json:
        show_json(document)
    else:
        show()


def versions() -> dict[str, str]:
    """What a report's numbers were made with."""
    import torch

    python = platform.python_version()
    return {"prunus": __version__, "torch": str(torch.__version__), "python": python}
