"""Sweep library models, each in a process of its own, and write one row per model.

    python benchmarks/coverage.py                        # the full list, hours
    python benchmarks/coverage.py --sample 60 --seed 0   # a stratified draw from it
    python benchmarks/coverage.py --resume               # only the models without a row
    python benchmarks/coverage.py timm:cait_xxs24_224    # some; their rows are replaced
    python benchmarks/coverage.py --list FILE            # NAME = path.py:factory, one a line

About 30 % of the units of every group go, all groups at once, and the pruned model's own forward
is held to the exactness line.  A factory returns a model, its args and its kwargs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, str]

RESULTS = Path(__file__).with_name("results") / "coverage_baseline.csv"
ENGINE = "prunus"
RATIO = 0.3
FIELDS = (
    "engine", "library", "model", "status", "verdict", "rel_err", "exchanged", "moved_min",
    "not_verified", "params_ratio", "prunable_share", "witness", "groups", "units", "unknown",
    "pins", "seconds", "peak_mb", "reason", "commit",
)  # fmt: skip
EXPECTED_PINS = ("a convolution needs every position", "keeps its shape")


def _models() -> ModuleType:
    """The list of models, imported late: other programs here may take this file for a package.

    Libraries look for the well-known ``coverage`` when they are imported, and find this file.
    """
    import coverage_models

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


def examine(name: str, target: str | None, row: Row, *, alone: bool = True) -> None:
    """Fill in the row of one model, as far as it comes."""
    import torch

    torch.set_num_threads(1)
    model, args, kwargs = _load(target) if target else _models().build(name)
    _hold_to_the_line(model, args, kwargs, row, alone=alone)


def _load(target: str) -> Any:
    import prunus

    prunus.declare_missing_ops()
    path, _, factory = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("listed", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, args, kwargs = getattr(module, factory)()
    return model.eval(), args, kwargs


def _hold_to_the_line(model: Any, args: Any, kwargs: Any, row: Row, *, alone: bool) -> None:
    import prunus

    row["status"] = "trace failed"
    graph = prunus.trace(model, args, kwargs)
    row |= {
        "status": "verify failed",
        "groups": str(len(graph.groups)),
        "units": str(graph.unit_count),
        "prunable_share": f"{_prunable_share(graph):.3f}",
        "unknown": "; ".join(f"{name} x{count}" for name, count in sorted(graph.unknown.items())),
        "pins": _pins(graph),
    }
    plan = prunus.plan(graph, model, ratio=RATIO, importance="random")
    if not plan.keep:
        row |= {"status": "refused", "reason": "nothing is prunable"}
        return
    certificate = prunus.verify(plan, model, args, kwargs, each_group=alone)
    moved = [value for value in certificate.moved_alone.values() if value > 1e-3]
    row |= {
        "status": "ok",
        "verdict": certificate.verdict,
        "rel_err": f"{certificate.rel_err:.1e}",
        "exchanged": f"{certificate.exchanged:.1e}",
        "moved_min": f"{min(moved, default=0):.1e}" if alone else "",
        "not_verified": str(len(certificate.unverified)) if alone else "",
        "params_ratio": f"{certificate.params[1] / certificate.params[0]:.3f}",
        "reason": _short(certificate.reason),
    }
    row["witness"] = _witness(plan, graph, model, args, kwargs)


def _witness(plan: Any, graph: Any, model: Any, args: Any, kwargs: Any) -> str:
    """What the second witness says, which shares nothing with the tracer."""
    import prunus

    model = copy.deepcopy(model)
    prunus.listen(model, args, kwargs)
    try:
        pruned = prunus.apply(plan, copy.deepcopy(model))
    except prunus.PrunusError as error:
        return _short(f"not asked: {error}")[:120]
    found = prunus.testify(plan, model, pruned, args, kwargs, outputs=graph.kept_outputs)
    error = "" if math.isnan(found.rel_err) else f" {found.rel_err:.1e}"
    return _short(f"{found.verdict}{error} {found.reason}")[:120].strip()


def _prunable_share(graph: Any) -> float:
    """Share of the parameters that lie on some prunable axis."""
    touched = {axis.tensor for axis in graph.labels}
    sizes = {name: math.prod(graph.shapes[name]) for name in graph.parameters}
    return sum(sizes[name] for name in sizes if name in touched) / max(sum(sizes.values()), 1)


def _pins(graph: Any) -> str:
    reasons = Counter(
        pin.reason for _, pin in graph.pins if not any(e in pin.reason for e in EXPECTED_PINS)
    )
    return "; ".join(f"{reason} x{count}" for reason, count in reasons.most_common(6))


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def _child(name: str, target: str | None, gigabytes: float, alone: bool, pipe: Any) -> None:
    """In the process of one model: whatever happens, a row goes up the pipe."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    row: Row = {"status": "not built"}
    started = time.perf_counter()
    try:
        examine(name, target, row, alone=alone)
    except BaseException as error:  # whatever a model may raise: its row says it
        _blame(error, row)
    row["seconds"] = f"{time.perf_counter() - started:.1f}"
    row["peak_mb"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}"
    pipe.send(row)


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


def sweep_one(
    name: str, target: str | None, seconds: float, gigabytes: float, *, alone: bool = True
) -> Row:
    """The row of one model, from a process of its own that is stopped at the limit."""
    library, _, short = name.partition(":")
    row: Row = {"engine": ENGINE, "library": library, "model": short, "commit": find_commit()}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(name, target, gigabytes, alone, sender), daemon=True
    )
    process.start()
    sender.close()
    if not receiver.poll(seconds):
        row |= {"status": "timeout", "seconds": f"{seconds:.0f}"}
        row["reason"] = f"stopped after {seconds:.0f} s"
    else:
        try:
            row |= receiver.recv()
        except EOFError:  # the process died before it could answer
            process.join()
            row |= {"status": "crashed", "reason": f"exit code {process.exitcode}"}
    process.kill()
    process.join()
    return row


def find_commit() -> str:
    """The short hash of HEAD, with a ``+`` where the working tree's sources differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(("git", *words), cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../src")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def read_rows(path: Path) -> dict[str, Row]:
    """Rows by ``library:model``; none where there is no file yet."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {f"{row['library']}:{row['model']}": row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Sorted by library and model; the old file stays whole until the new one is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    os.replace(draft, path)


def summarise(rows: Mapping[str, Row]) -> str:
    """Statuses and verdicts by library."""
    counts: dict[str, Counter[str]] = {}
    for row in rows.values():
        counts.setdefault(row["library"], Counter())[row.get("verdict") or row["status"]] += 1
    return "\n".join(f"{library}: {dict(count)}" for library, count in sorted(counts.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep the models asked for, one process after the other; every row is saved at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help="library:name; the whole list without")
    parser.add_argument("--list", type=Path, help="models from a file instead")
    parser.add_argument("--sample", type=int, help="draw that many, stratified by library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="skip models that have a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=float, default=120, help="seconds per model")
    parser.add_argument("--memory", type=float, default=10, help="GiB of address space per model")
    parser.add_argument("--together", action="store_true", help="don't try every group alone")
    options = parser.parse_args(argv)
    listed = read_list(options.list) if options.list else {}
    names = list(listed) or _models().names()
    if options.sample:
        names = draw(names, options.sample, options.seed)
    chosen = options.models or names
    rows = read_rows(options.out)
    for number, name in enumerate(chosen, 1):
        if options.resume and name in rows:
            continue
        rows[name] = sweep_one(
            name, listed.get(name), options.limit, options.memory, alone=not options.together
        )
        write_rows(options.out, rows)
        print(f"{number}/{len(chosen)}", json.dumps(
            {k: v for k, v in rows[name].items() if k not in ("pins", "engine", "commit")}
        ), flush=True)  # fmt: skip
    print(summarise(rows))


if __name__ == "__main__":
    main()
