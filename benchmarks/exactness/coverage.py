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
import csv
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.exactness.coverage_table import ENOUGH, OURS, PEERS, Key, Row, render
from benchmarks.rows import commit

RESULTS = Path(__file__).parents[1] / "results" / "coverage.csv"
ROOT = Path(__file__).resolve().parents[2]
RATIO = 0.3
BUDGETS = (0.5, 0.6, 0.7)
"""Half of the parameters is asked for; where floors stop it, the next that can be reached."""

ALONE_SECONDS = 3
"""Groups are tried one by one where that takes no longer than about this."""

FIELDS = (
    "engine", "library", "model", "status", "verdict", "moved", "param_ratio", "prunable_share",
    "seconds", "peak_mb", "reason", "line_ratio", "rel_err", "moved_min", "not_verified",
    "shapes", "witness", "shadow", "forward_s", "groups", "units", "unknown", "pins", "version",
    "commit",
)  # fmt: skip
EXPECTED_PINS = ("a convolution needs every position", "keeps its shape")


def _models() -> ModuleType:
    """The list of models, which imports torch."""
    from benchmarks.exactness import coverage_models

    return coverage_models


def draw(names: Sequence[str], size: int, seed: int) -> list[str]:
    """A sample that holds every library in its share, the same for the same seed.

    >>> draw(["timm:a", "timm:b", "ultralytics:c"], 60, 0)
    ['timm:a', 'timm:b', 'ultralytics:c']
    """
    strata = _models().STRATA
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
        return _models().build(name)

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
    import prunus

    forward = float(row["forward_s"])
    row["status"] = "trace failed"
    graph = prunus.trace(model, args, kwargs)
    row |= {
        "status": "failed",
        "groups": str(len(graph.groups)),
        "units": str(graph.unit_count),
        "prunable_share": f"{_prunable_share(graph):.3f}",
        "unknown": "; ".join(f"{name} x{count}" for name, count in sorted(graph.unknown.items())),
        "pins": _pins(graph),
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
    row |= {"reason": _short("; ".join(told))}
    if certificate.verdict != "exact":
        row |= {"verdict": certificate.verdict}
    prunus.verifier.randomize(model, args, kwargs)
    row |= {"shadow": _shadow(line.plan, model, args, kwargs)}
    if witness or not row["shadow"].startswith("agrees"):
        row |= {"witness": _witness(graph, model, args, kwargs, half.held)}
    enough = float(row["param_ratio"]) <= ENOUGH
    row["status"] = "ok" if enough else "too little removed"


def _hold_to_the_line(
    model: Any, args: Any, kwargs: Any, hold: tuple[str, ...], *, alone: bool
) -> Any:
    """A copy that lost about 30 % of every group, but of those that the proof rejects.

    Where rounding changes a choice that the forward makes (which queries are the best ones, say),
    the proof is asked for in float64.
    """
    import prunus
    from tests.shadow import as_double

    options: Any = {"ratio": RATIO, "importance": "random", "hold": hold, "each_group": alone}
    try:
        return prunus.shrink(copy.deepcopy(model), args, kwargs, **options)
    except prunus.PrunusError:
        wide = copy.deepcopy(model).double()
        args, kwargs = as_double((args, kwargs))
        return prunus.shrink(wide, args, kwargs, **options)


def _halve(model: Any, args: Any, kwargs: Any) -> Any:
    """Shrunk to half of the parameters, or to the least that the floors allow."""
    import prunus

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
    import torch

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


def _witness(graph: Any, model: Any, args: Any, kwargs: Any, held: Iterable[str]) -> str:
    """What the second witness says of the groups that nothing mixes."""
    import prunus

    mixed = [group.name for group in graph.groups if group.mixing]
    plan = prunus.plan(graph, model, ratio=RATIO, importance="random", hold=[*mixed, *held])
    if not plan.keep:
        return "none (all groups mix)"
    from tests.witness import testify

    try:
        pruned = prunus.apply(plan, copy.deepcopy(model))
    except prunus.PrunusError as error:
        return _short(f"not asked: {error}")[:120]
    found = testify(plan, model, pruned, args, kwargs, outputs=graph.kept_outputs)
    error = "" if math.isnan(found.rel_err) else f" {found.rel_err:.1e}"
    return _short(f"{found.verdict}{error} {found.reason}")[:120].strip()


def _shadow(plan: Any, model: Any, args: Any, kwargs: Any) -> str:
    """What a forward with a mask beside every tensor says of all groups at once, in float64."""
    import prunus
    from tests import shadow

    try:
        pruned = prunus.apply(plan, copy.deepcopy(model)).double()
        gap = shadow.compare(model, pruned, plan.keep, args, kwargs)
    except prunus.PrunusError as error:
        return _short(f"not asked: {error}")[:120]
    except Exception as error:  # an operator or a type that it does not know
        return _short(f"undecided {type(error).__name__}: {error}")[:120]
    return f"{'agrees' if gap <= 1e-5 else 'disagrees'} {gap:.1e}"


def _prunable_share(graph: Any) -> float:
    """Share of the parameters that lie on some prunable axis."""
    touched = {axis.tensor for axis in graph.labels}
    sizes = {name: math.prod(graph.shapes[name]) for name in graph.parameters}
    return sum(sizes[name] for name in sizes if name in touched) / max(sum(sizes.values()), 1)


def _pins(graph: Any) -> str:
    """The commonest reasons, each with the operator, module and line of one case."""
    reasons: Counter[str] = Counter()
    where: dict[str, str] = {}
    for _, pin in graph.pins:
        if not any(expected in pin.reason for expected in EXPECTED_PINS):
            reasons[pin.reason] += 1
            where.setdefault(pin.reason, str(pin))
    return "; ".join(f"{where[reason]} x{count}" for reason, count in reasons.most_common(6))


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def ask_peer(engine: str, model: Any, args: Any, kwargs: Any, row: Row) -> None:
    """What another engine makes of the model; see ``peers.py``."""
    from benchmarks.peers import peers

    row["status"] = "failed"
    found = peers.PEERS[engine](model, args, kwargs)
    row |= {
        "status": found.status,
        "verdict": found.verdict,
        "moved": _number(found.moved, ".1e"),
        "param_ratio": _number(found.param_ratio, ".3f"),
        "seconds": f"{found.seconds:.1f}",
        "reason": _short(found.reason),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def _time_forward(model: Any, args: Any, kwargs: Any) -> float:
    """Processor seconds of one plain forward, after another one."""
    import torch

    with torch.no_grad():
        model(*args, **kwargs)
        started = time.process_time()
        model(*args, **kwargs)
    return time.process_time() - started


def _child(key: Key, target: str | None, gigabytes: float, witness: bool, pipe: Connection) -> None:
    """In the process of one model: whatever happens, a row goes up the pipe."""
    import torch

    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine, name = key
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
        _blame(error, row)
    row.setdefault("seconds", f"{time.process_time() - started:.1f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["peak_mb"] = f"{(peak - before) / 1024:.0f}"
    pipe.send(row)
    pipe.close()
    os._exit(0)  # what the libraries registered to run at exit is the parent's to run


def _blame(error: BaseException, row: Row) -> None:
    import prunus

    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        row["status"] = "out of memory"
    elif isinstance(error, prunus.PrunusError) and row["status"] != "trace failed":
        row["status"] = "refused"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    row["reason"] = _short(f"{type(error).__name__}: {text}")
    if last is not None:
        file = Path(last.tb_frame.f_code.co_filename).name
        row["reason"] += f" [{file}:{last.tb_lineno}]"


# -- all of them -----------------------------------------------------------------------------------


class Running:
    """A child that works on one row."""

    def __init__(self, key: Key, target: str | None, gigabytes: float, witness: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.key = key
        self.started = time.perf_counter()
        self._pipe, sender = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_child, args=(key, target, gigabytes, witness, sender), daemon=True
        )
        self._process.start()
        sender.close()

    def row(self, limit: float) -> Row | None:
        """The row, once there is one, or the time is up."""
        engine, name = self.key
        library, _, short = name.partition(":")
        row: Row = {"engine": engine, "library": library, "model": short, "commit": commit(),
                    "version": _version(engine)}  # fmt: skip
        if self._pipe.poll(0.2):
            try:
                row |= self._pipe.recv()
            except EOFError:  # the process died before it could answer
                self._process.join()
                row |= {"status": "crashed", "reason": f"exit code {self._process.exitcode}"}
        elif time.perf_counter() - self.started > limit:
            row |= {"status": "timeout", "seconds": f"{limit:.0f}"}
            row["reason"] = f"stopped after {limit:.0f} s"
        else:
            return None
        self._process.kill()
        self._process.join()
        return row


def sweep(
    keys: Sequence[Key],
    targets: Mapping[str, str],
    *,
    limit: float,
    gigabytes: float,
    jobs: int,
    witness: bool,
    done: Callable[[Key, Row], None],
) -> None:
    """Work through the rows, ``jobs`` at a time."""
    waiting = list(reversed(keys))
    running: list[Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            key = waiting.pop()
            running.append(Running(key, targets.get(key[1]), gigabytes, witness))
        for one in list(running):
            row = one.row(limit)
            if row is not None:
                running.remove(one)
                done(one.key, row)


def preload(engines: Iterable[str]) -> None:
    """Import once what every child needs."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))  # for ``tests.shadow``
    models = _models()
    models.import_libraries()
    if any(engine != OURS for engine in engines):
        importlib.import_module("benchmarks.peers.peers")
    gc.freeze()  # a collection in a child would copy all these pages


def _version(engine: str) -> str:
    return importlib.metadata.version(PEERS.get(engine, OURS))


def read_rows(path: Path) -> dict[Key, Row]:
    """Rows by engine and model; none where there is no file yet."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["engine"], f"{row['library']}:{row['model']}"): row for row in rows}


def write_rows(path: Path, rows: Mapping[Key, Row]) -> None:
    """Sorted by engine, library and model; the old file stays whole until the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    os.replace(draft, path)


def _save(path: Path, rows: Mapping[Key, Row]) -> None:
    write_rows(path, rows)
    path.with_suffix(".md").write_text(render(rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep what is asked for; every row is saved at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help="library:name; the whole list without")
    parser.add_argument("--engine", action="append", choices=(OURS, *PEERS), help="ours without")
    parser.add_argument("--list", type=Path, help="models from a file instead")
    parser.add_argument("--sample", type=int, help="draw that many, stratified by library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="skip what has a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=float, default=300, help="seconds per row")
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space per row")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--witness", action="store_true", help="ask the second witness always")
    parser.add_argument("--table", action="store_true", help="render the table and stop")
    options = parser.parse_args(argv)
    rows = read_rows(options.out)
    if options.table:
        _save(options.out, rows)
        return
    engines = options.engine or [OURS]
    preload(engines)
    listed = read_list(options.list) if options.list else {}
    names = list(listed) or _models().names()
    if options.sample:
        names = draw(names, options.sample, options.seed)
    keys = [(engine, name) for engine in engines for name in options.models or names]
    keys = [key for key in keys if not (options.resume and key in rows)]
    finished = 0

    def done(key: Key, row: Row) -> None:
        nonlocal finished
        finished += 1
        row = dict.fromkeys(FIELDS, "") | row
        rows.update({**read_rows(options.out), key: row})  # another sweep may write as well
        _save(options.out, rows)
        shown = {k: v for k, v in row.items() if k not in ("pins", "version", "commit", "library")}
        print(f"{finished}/{len(keys)}", json.dumps(shown), flush=True)

    for engine in engines:
        sweep(
            [key for key in keys if key[0] == engine],
            listed,
            limit=options.limit,
            gigabytes=options.memory,
            jobs=options.jobs,
            witness=options.witness,
            done=done,
        )


if __name__ == "__main__":
    main()
