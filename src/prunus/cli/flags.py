"""The flags of every verb; those of a plan are read off its options record."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from prunus.cli.values import (
    FILES,
    SIZES,
    block,
    bound,
    by_glob,
    count,
    new_file,
    new_picture,
    number,
    numbers,
    old_file,
    scope,
    shape,
    stream,
)
from prunus.errors import PlanError
from prunus.graph.amounts import REMOVABLE
from prunus.graph.budget import COSTS, TIMERS, Budget
from prunus.planner.option_values import Normalise, texts_of
from prunus.planner.options import PlanOptions

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
  data.yaml           of a data set of ultralytics (the extra 'yolo'): likewise its training images
  FILE.npz            with the array 'inputs', prepared as the model wants it
  FILE.txt            one text a line (the extra 'hf'), with the tokenizer in --tokenizer FOLDER or
                      beside an hf: model
  path/to/file.py:F   what the function F() returns: an iterable of batches
"""

RECOVERIES = ("auto", "none", "recalibrate", "bias", "least_squares", "sequential")

_OF_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "ratios": {"metavar": "GLOB=R,…", "type": by_glob(number, single=False)},
    "drop": {"metavar": "N|NAME", "type": block, "action": "append"},
    "importance": {"metavar": "NAME"},
    "scope": {"metavar": "SCOPE|GLOB,…", "type": scope},
    "normalise": {"choices": get_args(Normalise)},
    "round_to": {"metavar": "N|GLOB=N,…", "type": by_glob(count)},
    "min_width": {"metavar": "N|GLOB=N,…", "type": by_glob(count)},
    "max_ratio": {"metavar": "R|GLOB=R,…", "type": by_glob(number)},
    "include": {"metavar": "GLOB", "action": "append"},
    "exclude": {"metavar": "GLOB", "action": "append"},
    "part": {"metavar": "PATH"},
}
"""Options of a plan that have a flag, with how it is read; names, defaults and help are theirs."""

_BY_TABLE = (
    "ratios", "drop", "scope", "normalise", "round_to", "min_width", "max_ratio", "latency",
)  # fmt: skip
"""Options that say how much every group loses, as a table of sensitivities does."""


def add_parser(
    verbs: Any, verb: str, text: str, run: Callable[[argparse.Namespace], int], *epilog: str
) -> argparse.ArgumentParser:
    """The parser of a verb; ``text`` says what it does, and ``run`` does it."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text,
        description=text,
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_options(group: argparse._ActionsContainer, *names: str) -> None:
    """Flags of a plan's options, of which the record says what they mean."""
    texts = texts_of(PlanOptions)
    for one in fields(PlanOptions):
        if one.name not in names:
            continue
        how = dict(_OF_OPTIONS[one.name])
        text = " ".join(texts.get(one.name, "").partition("\n\n")[0].split()).replace("``", "")
        if how.get("action") == "append":
            text = f"{text.removesuffix('.')}; may be repeated"
        default = list(one.default) if isinstance(one.default, tuple) else one.default
        group.add_argument(_spell(one.name), default=default, help=text.replace("%", "%%"), **how)


def add_model(parser: argparse.ArgumentParser, *, flag: bool = False) -> None:
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
    add_answer(parser)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """PLAN, a file."""
    parser.add_argument("plan_file", metavar="PLAN", type=old_file, help="what 'prunus plan' wrote")


def add_answer(parser: argparse.ArgumentParser) -> None:
    """How a verb answers."""
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument(
        "--log", metavar="FILE", type=stream, help="write what happens, as JSON lines"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Calibration data, and how it is prepared."""
    group = parser.add_argument_group("calibration data")
    group.add_argument(
        "--data", metavar="DATA", help="batches for batch norms and importances; see below"
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=count,
        default=512,
        help="samples of it that are used: the first ones, in whole batches (default: 512)",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}", metavar="R,R,…", type=numbers, help="of the images' channels"
        )
    group.add_argument("--tokenizer", metavar="FOLDER", help="for a text file")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """What to remove: bounds, and the options of a plan."""
    group = parser.add_argument_group("what to remove")
    for name in COSTS:
        example = "8MB or 8MiB" if name in SIZES else "2000000"
        text = f"upper bound: a fraction of the dense cost, as 0.5, or a number, as {example}"
        if name == "latency":
            text = (
                "a fraction of the time that the dense model takes on this machine, as 0.5, or a "
                "time, as 12ms: smaller models are timed in turn with the dense one"
            )
        metavar = "N|TIME" if name == "latency" else "N"
        group.add_argument(f"--{name}", metavar=metavar, type=bound(name), help=text)
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
        "--sensitivity",
        metavar="FILE",
        type=old_file,
        help="a table of 'prunus sensitivity': what a group loses costs the metric as little as "
        "what any other loses, just enough for the bounds; without bounds it is what the table's "
        "--tolerance found",
    )
    for name, structure in REMOVABLE.items():
        text = f"of {structure.text}: a share of each layer, as 0.3 or 30%, or a count, as 2"
        group.add_argument(
            _spell(name), metavar="R|N|LAYER=N,…", type=by_glob(str), help=text.replace("%", "%%")
        )
    add_options(group, *_OF_OPTIONS)


def add_cut(parser: argparse.ArgumentParser, *leave_out: str) -> None:
    """What a cut writes, and how it is verified and repaired."""
    add_files(parser, {name: text for name, text in FILES.items() if name not in leave_out})
    add_data(parser)
    parser.add_argument(
        "--recover",
        choices=RECOVERIES,
        default="auto",
        help="what the calibration data repair: weights by least squares, then layer norms, then "
        "batch norms, of these what brings the outputs nearer to the dense model's (auto, the "
        "default; without --data it moves batch norms by what random inputs say); or weights or "
        "batch norms alone; or layer after layer, each on what the repaired ones before it give "
        "(sequential: better, and slower); or nothing",
    )
    parser.add_argument("--no-verify", action="store_true", help="don't verify the cut")


def add_files(parser: argparse.ArgumentParser, files: Mapping[str, str]) -> None:
    """Files to write, by the option's name and what it says."""
    group = parser.add_argument_group("files to write")
    for name, text in files.items():
        kind = new_picture if name == "picture" else new_file
        group.add_argument(f"--{name}", metavar="FILE", type=kind, help=text)


def choice_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a plan; :class:`PlanError` where flags contradict one another."""
    chosen = {name: getattr(options, name) for name in (*_OF_OPTIONS, "seed")}
    chosen["budget"] = _budget(options)
    chosen["remove"] = _remove(options)
    if options.sensitivity is not None:
        _check_beside_table(options)
        chosen["ratios"] = {}  # which the table will say
    if len(options.drop) == 1 and isinstance(options.drop[0], int):
        chosen["drop"] = options.drop[0]
    if chosen["budget"] is chosen["remove"] is chosen["ratios"] is None and not options.drop:
        raise PlanError(
            f"give a budget: {', '.join(map(_spell, COSTS))}; or say what is removed: "
            f"{', '.join(map(_spell, REMOVABLE))}",
            fix="--macs 0.5 or --heads 0.3, say",
        )
    PlanOptions(**chosen).check()
    return chosen


def _budget(options: argparse.Namespace) -> Budget | None:
    bounds = {n: getattr(options, n) for n in COSTS if getattr(options, n) is not None}
    within: dict[str, dict[str, Any]] = {}
    for glob, text in options.within:
        name, _, value = text.partition("=")
        try:
            within.setdefault(glob, {})[name] = bound(name)(value)
        except argparse.ArgumentTypeError as error:
            fix = "write it as: --within layer4 macs=0.3"
            raise PlanError(str(error), where=f"--within {glob} {text}", fix=fix) from None
    if options.latency is not None:
        bounds["timer"] = options.backend
    if not bounds and not within:
        return None
    return Budget(**bounds, within={glob: Budget(**inner) for glob, inner in within.items()})


def _remove(options: argparse.Namespace) -> dict[str, Any] | None:
    """What is removed by structure."""
    asked = {name: getattr(options, name) for name in REMOVABLE}
    return {name: amount for name, amount in asked.items() if amount is not None} or None


def _check_beside_table(options: argparse.Namespace) -> None:
    defaults = {one.name: one.default for one in fields(PlanOptions)} | {"latency": None}
    given = [n for n in _BY_TABLE if getattr(options, n) not in (defaults[n], [])]
    given += _remove(options) or {}
    if given:
        raise PlanError(
            f"{', '.join(map(_spell, given))} can't be combined with --sensitivity",
            why="what every group loses is read from the table",
            fix="leave out one or the other; --include and --exclude choose rows of the table",
        )


def _spell(name: str) -> str:
    return f"--{name.replace('_', '-')}"
