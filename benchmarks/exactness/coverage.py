"""Sweep library models through Prunus and its peers; one row per engine and model.

    python -m benchmarks.exactness.coverage   # our rows of the full list, an hour
    python -m benchmarks.exactness.coverage --engine torch-pruning  # a peer's; several may be named
    python -m benchmarks.exactness.coverage --resume  # only what has no row yet
    python -m benchmarks.exactness.coverage timm:cait_xxs24_224  # some; their rows are replaced
    python -m benchmarks.exactness.coverage --sample 60 --seed 0  # a stratified draw from the list
    python -m benchmarks.exactness.coverage --list FILE  # NAME = path.py:factory, one a line
    python -m benchmarks.exactness.coverage --table  # only render results/coverage.md

Every model runs in a process of its own, forked from one that has imported the libraries, under a
limit of time and memory; a peer has 60 s of processor time for its own part.  A factory returns a
model, its args and its kwargs.

Of ours two plans are held to the exactness line: about 30 % of the units of every group at once,
and half of the parameters asked for as a user would.  The shadow run (``tests/shadow.py``, which
shares nothing with the engine) judges all groups at once; where it is undecided, and with
``--witness`` everywhere, the second witness judges those that nothing mixes.
``shapes`` says on how many shapes of inputs the pruned and the masked model were compared.
``seconds`` are those of trace, plan, proof and cut, ``forward_s`` those of one plain forward, both
in processor time on one thread, so that other work on the machine does not count;
``peak_mb`` is what the process took beyond the imported libraries.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import math
import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import prunus
from benchmarks.apart import FailedError, Process, StoppedError, peak_mb
from benchmarks.exactness import coverage_models
from benchmarks.exactness.coverage_table import ENOUGH, OURS, PEERS, Row, render
from benchmarks.exactness.judges import RATIO, ask_shadow, ask_witness, name_pins, short
from benchmarks.peers.engines import PEERS as DRIVERS
from benchmarks.peers.judge import blame
from benchmarks.rows import Table, commit
from tests.shadow import as_double

BUDGETS = (0.5, 0.6, 0.7)
"""Half of the parameters is asked for; where floors stop it, the next that can be reached."""

ALONE_SECONDS = 3
"""Groups are tried one by one where that takes no longer than about this."""

TABLE = Table(
    "coverage.csv",
    (
        "engine", "library", "model", "status", "verdict", "moved", "param_ratio",
        "prunable_share", "seconds", "peak_mb", "reason", "line_ratio", "rel_err", "moved_min",
        "not_verified", "shapes", "witness", "shadow", "forward_s", "groups", "units", "unknown",
        "pins", "version", "commit",
    ),
    ("engine", "library", "model"),
    lambda row: (row["engine"], f"{row['library']}:{row['model']}"),
)  # fmt: skip


def draw(names: Sequence[str], size: int, seed: int) -> list[str]:
    """A sample that holds every library in its share, the same for the same seed.

    >>> draw(["timm:a", "timm:b", "ultralytics:c"], 60, 0)
    ['timm:a', 'timm:b', 'ultralytics:c']
    """
    strata = coverage_models.STRATA
    chosen: set[str] = set()
    for library, share in strata.items():
        own = sorted(name for name in names if name.startswith(f"{library}:"))
        wanted = round(size * share / sum(strata.values()))
        chosen.update(random.Random(f"{seed} {library}").sample(own, min(wanted, len(own))))
    return [name for name in names if name in chosen]


def read_list(path: Path) -> dict[str, str]:
    """Name → ``path.py:factory``; paths are relative to the list, ``#`` begins a comment."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, equals, target = (part.strip() for part in text.partition("="))
        file, colon, factory = target.rpartition(":")
        if not (name and equals and file and colon and factory):
            raise SystemExit(f"{path}:{number}: {text!r} is not NAME = path.py:factory")
        name = name if ":" in name else f"list:{name}"
        found[name] = f"{(path.parent / file).resolve()}:{factory}"
    return found


# -- one model, in its own process -----------------------------------------------------------------


def build(name: str, target: str | None) -> Any:
    """The model of a row, with its args and kwargs."""
    if target is None:
        return coverage_models.build(name)
    path, _, factory = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("listed", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, args, kwargs = getattr(module, factory)()
    return model.eval(), args, kwargs


def examine(model: Any, args: Any, kwargs: Any, row: Row, *, witness: bool) -> None:
    """Prune one model to half of its parameters, and hold another copy to the exactness line."""
    forward = float(row["forward_s"])
    row["status"] = "trace failed"
    graph = prunus.trace(model, args, kwargs)
    row |= {
        "status": "failed",
        "groups": str(len(graph.groups)),
        "units": str(graph.unit_count),
        "prunable_share": f"{_prunable_share(graph):.3f}",
        "unknown": "; ".join(f"{name} x{count}" for name, count in sorted(graph.unknown.items())),
        "pins": name_pins(graph),
    }
    started = time.process_time()
    half = _halve(copy.deepcopy(model), args, kwargs)
    proof = half.certificate
    row |= {
        "seconds": f"{time.process_time() - started:.1f}",
        "param_ratio": f"{proof.params[1] / proof.params[0]:.3f}",
        "verdict": proof.verdict,
        "rel_err": f"{proof.rel_err:.1e}",
        "shapes": str(_count_shapes(proof.inputs)),
    }
    if not _answers_alike(model, half.model, args, kwargs, graph.kept_outputs):
        row |= {"status": "shape changed"}
        return
    alone = forward * len(graph.groups) <= ALONE_SECONDS
    line = _hold_to_the_line(model, args, kwargs, tuple(half.held), alone=alone)
    certificate = line.certificate
    moved = [value for value in certificate.moved_alone.values() if value > 1e-3]
    row |= {
        "moved": f"{certificate.moved:.1e}",
        "line_ratio": f"{certificate.params[1] / certificate.params[0]:.3f}",
        "rel_err": f"{max(proof.rel_err, certificate.rel_err):.1e}",
        "moved_min": f"{min(moved, default=0):.1e}" if alone else "",
        "not_verified": str(len(certificate.unverified)) if alone else "",
    }
    told = [f"{name} held: {why}" for name, why in {**half.held, **line.held}.items()]
    if certificate.dtype == "float64":
        told.append("proven in float64")
    row |= {"reason": short("; ".join(told))}
    if certificate.verdict != "exact":
        row |= {"verdict": certificate.verdict}
    prunus.verifier.randomize(model, args, kwargs)
    row |= {"shadow": ask_shadow(line.plan, model, args, kwargs, tolerance=1e-5)}
    if witness or not row["shadow"].startswith("agrees"):
        row |= {"witness": ask_witness(graph, model, args, kwargs, hold=[*half.held])}
    enough = float(row["param_ratio"]) <= ENOUGH
    row["status"] = "ok" if enough else "too little removed"


def _hold_to_the_line(
    model: Any, args: Any, kwargs: Any, hold: tuple[str, ...], *, alone: bool
) -> Any:
    """A copy that lost about 30 % of every group, but of those that the proof rejects.

    Where rounding changes a choice that the forward makes (which queries are the best ones, say),
    the proof is asked for in float64.
    """
    options: Any = {"ratio": RATIO, "importance": "random", "hold": hold, "each_group": alone}
    try:
        return prunus.shrink(copy.deepcopy(model), args, kwargs, **options)
    except prunus.PrunusError:
        wide = copy.deepcopy(model).double()
        args, kwargs = as_double((args, kwargs))
        return prunus.shrink(wide, args, kwargs, **options)


def _halve(model: Any, args: Any, kwargs: Any) -> Any:
    """Shrunk to half of the parameters, or to the least that the floors allow."""
    for share in BUDGETS:
        budget = prunus.Budget(params=share)
        try:
            return prunus.shrink(model, args, kwargs, budget=budget, each_group=False)
        except prunus.errors.BudgetError:
            continue
    return prunus.shrink(model, args, kwargs, ratio=0.6, importance="random", each_group=False)


def _count_shapes(inputs: Sequence[str]) -> int:
    """On how many shapes of inputs the certificate compared: the example's, and perhaps another."""
    example = ("given inputs", "as traced")
    others = (line for line in inputs if not line.startswith((*example, "not compared")))
    return any(line.startswith(example) for line in inputs) + sum(1 for _ in others)


def _answers_alike(model: Any, pruned: Any, args: Any, kwargs: Any, outputs: Iterable[str]) -> bool:
    """Whether the pruned model's own forward runs and answers in the shapes of the original."""
    with torch.no_grad():
        before, after = (shapes_of(one(*args, **kwargs)) for one in (model, pruned))
    return all(before[name] == after.get(name) for name in outputs)


def shapes_of(answer: Any, path: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in nested containers, by dotted names."""
    if hasattr(answer, "shape"):
        return {path or "output": tuple(answer.shape)}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(answer, Mapping):
        items = answer.items()
    elif isinstance(answer, (list, tuple)):
        items = zip(getattr(answer, "_fields", range(len(answer))), answer, strict=True)
    elif hasattr(answer, "__dataclass_fields__"):
        items = ((name, getattr(answer, name)) for name in answer.__dataclass_fields__)
    found: dict[str, tuple[int, ...]] = {}
    for name, value in items:
        found |= shapes_of(value, f"{path}.{name}" if path else str(name))
    return found


def _prunable_share(graph: Any) -> float:
    """Share of the parameters that lie on some prunable axis."""
    touched = {axis.tensor for axis in graph.labels}
    sizes = {name: math.prod(graph.shapes[name]) for name in graph.parameters}
    return sum(sizes[name] for name in sizes if name in touched) / max(sum(sizes.values()), 1)


def ask_peer(engine: str, model: Any, args: Any, kwargs: Any, row: Row) -> None:
    """What another engine makes of the model; see ``peers/engines.py``."""
    row["status"] = "failed"
    found = DRIVERS[engine](model, args, kwargs)
    row |= {
        "status": found.status,
        "verdict": found.verdict,
        "moved": _number(found.moved, ".1e"),
        "param_ratio": _number(found.param_ratio, ".3f"),
        "seconds": f"{found.seconds:.1f}",
        "reason": short(found.reason),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def _time_forward(model: Any, args: Any, kwargs: Any) -> float:
    """Processor seconds of one plain forward, after another one."""
    with torch.no_grad():
        model(*args, **kwargs)
        started = time.process_time()
        model(*args, **kwargs)
    return time.process_time() - started


def answer(engine: str, name: str, target: str | None, witness: bool) -> Row:
    """In the process of one model: its row, whatever happens."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = peak_mb()
    row: Row = {"status": "not built"}
    started = time.process_time()
    try:
        model, args, kwargs = build(name, target)
        row["forward_s"] = f"{_time_forward(model, args, kwargs):.3f}"
        started = time.process_time()
        if engine == OURS:
            examine(model, args, kwargs, row, witness=witness)
        else:
            ask_peer(engine, model, args, kwargs, row)
    except BaseException as error:  # whatever a model may raise: its row says it
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            row["status"] = "out of memory"
        elif isinstance(error, prunus.PrunusError) and row["status"] != "trace failed":
            row["status"] = "refused"
        row["reason"] = blame(error)
    row.setdefault("seconds", f"{time.process_time() - started:.1f}")
    return row | {"peak_mb": f"{peak_mb() - before:.0f}"}


def wait_for(process: Process, limit: float) -> Row:
    """The row of a process that is ready."""
    try:
        row: Row = process.result()
    except StoppedError as stopped:
        row = {"status": "timeout", "seconds": f"{limit:.0f}", "reason": str(stopped)}
    except FailedError as died:
        row = {"status": "crashed", "reason": str(died)}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep what is asked for; every row is saved at once."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", help="library:name; the whole list without")
    parser.add_argument("--engine", action="append", choices=(OURS, *PEERS), help="ours without")
    parser.add_argument("--list", type=Path, help="models from a file instead")
    parser.add_argument("--sample", type=int, help="draw that many, stratified by library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="skip what has a row")
    parser.add_argument("--limit", type=float, default=300, help="seconds per row")
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space per row")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--witness", action="store_true", help="ask the second witness always")
    parser.add_argument("--table", dest="render", action="store_true", help="only render the table")
    options = parser.parse_args(argv)
    table: Table = options.table
    waiting = [] if options.render else wanted(options)
    if waiting:
        torch.set_num_threads(1)
        coverage_models.import_libraries()
        gc.freeze()  # a collection in a child would copy all these pages
    running: dict[Process, Row] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            row, target = waiting.pop(0)
            name = f"{row['library']}:{row['model']}"
            process = Process(
                *(answer, row["engine"], name, target, options.witness),
                start="fork", seconds=options.limit, gigabytes=options.memory,
            )  # fmt: skip
            running[process] = row
        for process in [process for process in running if process.ready()]:
            table.add(running.pop(process) | wait_for(process, options.limit))
    table.path.with_suffix(".md").write_text(render(table.read()), encoding="utf-8")


def wanted(options: argparse.Namespace) -> list[tuple[Row, str | None]]:
    """The rows to be made, as far as they are known before, and where their models are listed."""
    listed = read_list(options.list) if options.list else {}
    names = options.models or list(listed) or coverage_models.names()
    if options.sample and not options.models:
        names = draw(names, options.sample, options.seed)
    done = options.table.done() if options.resume else set()
    found = []
    for engine in options.engine or [OURS]:
        version = importlib.metadata.version(PEERS.get(engine, OURS))
        for name in names:
            library, _, model = name.partition(":")
            row = {"engine": engine, "library": library, "model": model,
                   "version": version, "commit": commit()}  # fmt: skip
            if options.table.key_of(row) not in done:
                found.append((row, listed.get(name)))
    return found


if __name__ == "__main__":
    main()
