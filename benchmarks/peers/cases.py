"""Run the replicas of reported failures through every engine, and write ``results/cases.csv``.

    python -m benchmarks.peers.cases   # all cases, all engines, some minutes
    python -m benchmarks.peers.cases swin_patch_merging  # some, by name; their rows are replaced
    python -m benchmarks.peers.cases --engine prunus

Every engine is asked for half of the units of each group (torch-kirigami: of the parameters), in a
process of its own that is stopped after a minute.  A row says what became of it: ``exact`` and
``inexact`` are about models that run afterwards, with outputs of the same shapes, and have lost
something; ``not judged`` are those of which the comparison says nothing; else it is how it failed.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "cases.csv"
FIELDS = ("case", "replica", "engine", "verdict", "param_ratio", "seconds", "reason", "version")
LIMIT = 60
SHARE = 0.5
PACKAGES = {"prunus": "prunus", "torch-pruning": "torch-pruning",
            "torch-pruning+hints": "torch-pruning", "torch-kirigami": "torch-kirigami"}  # fmt: skip
Row = dict[str, str]


def run_prunus(model: Any, args: Any, kwargs: Any) -> Any:
    """Ours, asked for as much; judged by its own proof, and by the measure of the others."""
    import prunus
    from benchmarks.peers import peers

    def prune(twin: Any) -> Any:
        graph = prunus.trace(twin, args, kwargs)
        chosen = prunus.plan(graph, twin, ratio=SHARE, importance="l2")
        if not chosen.keep:
            raise RuntimeError("nothing is prunable")
        plans.append(chosen)
        return prunus.apply(chosen, twin)

    plans: list[Any] = []
    found = peers.judge(model, args, kwargs, prune)
    if not plans or found.verdict == "inexact":
        return found
    proof = prunus.verify(plans[0], model, args, kwargs, each_group=False)
    verdict = "not judged" if proof.verdict == "not verified" else proof.verdict
    return replace(found, verdict=verdict, rel_err=proof.rel_err, reason=proof.reason)


def engines() -> dict[str, Callable[..., Any]]:
    """Functions by the engine's name."""
    from benchmarks.peers import peers

    return {"prunus": run_prunus, **peers.PEERS}


def examine(engine: str, case: Any, pipe: Any, **options: Any) -> None:
    """In the process of one row: whatever happens, an outcome goes up the pipe."""
    import torch

    from benchmarks.peers import peers

    try:
        torch.manual_seed(0)
        model = case.build().eval()
        args, kwargs = case.example()
        pipe.send(engines()[engine](model, args, kwargs, **options))
    except BaseException as error:  # whatever is raised: its row says it
        pipe.send(peers.Outcome("failed", reason=f"the benchmark: {peers.blame(error)}"))


def measure(engine: str, case: Any, **options: Any) -> Any:
    """The outcome of one row, or nothing if it did not finish."""
    from benchmarks.peers import peers

    # Forked, since importing every library anew for each of some hundred rows takes far longer.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine, args=(engine, case, sender), kwargs=options)
    process.start()
    sender.close()
    found = None
    if receiver.poll(LIMIT):
        try:
            found = receiver.recv()
        except EOFError:  # the process died before it could answer
            process.join()
            found = peers.Outcome("failed", reason=f"the process died: {process.exitcode}")
    process.kill()
    process.join()
    return found


def describe(engine: str, case: Any) -> Row:
    """One row of the table."""
    found, note = measure(engine, case), ""
    if found is None and engine == "torch-kirigami":
        note = f"scoring did not finish in {LIMIT} s, without it: "
        found = measure(engine, case, scored=False)
    row = {
        "case": case.number,
        "replica": case.name,
        "engine": engine,
        "version": importlib.metadata.version(PACKAGES[engine]),
    }
    if found is None:
        reason = f"{note}stopped after {LIMIT} s"
        return row | {"verdict": "time-out", "seconds": f"{LIMIT}", "reason": reason}
    verdict, reason = found.status, note + found.reason
    if found.status in ("ok", "too little removed"):
        verdict = found.verdict
        if found.reason == "nothing was removed":
            verdict, reason = "nothing removed", note
        elif found.verdict == "inexact":
            reason = f"outputs are off by {found.rel_err:.1e} {reason}".strip()
    ratio = "" if math.isnan(found.param_ratio) else f"{found.param_ratio:.3f}"
    row |= {"verdict": verdict, "param_ratio": ratio, "reason": reason}
    return row | {"seconds": "" if math.isnan(found.seconds) else f"{found.seconds:.2f}"}


def prepare() -> Sequence[Any]:
    """Import what the rows need, once; the cases."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="prunus-yolo-"))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    for name in ("timm", "transformers", "ultralytics", "torch_pruning", "torch_kirigami.pruning"):
        importlib.import_module(name)
    from benchmarks.peers import case_models

    return case_models.CASES


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """Rows by replica and engine; none where there is no file yet."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["replica"], row["engine"]): row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The old file stays whole until the new one is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


def summarise(rows: Mapping[tuple[str, str], Row]) -> str:
    """Verdicts by engine."""
    counts: dict[str, Counter[str]] = {}
    for (_, engine), row in rows.items():
        counts.setdefault(engine, Counter())[row["verdict"]] += 1
    return "\n".join(f"{engine}: {dict(count.most_common())}" for engine, count in counts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the replicas asked for, engines in turn; every row is saved at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("replicas", nargs="*", help="names; all without")
    parser.add_argument("--engine", choices=tuple(PACKAGES), help="only this one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    cases = prepare()
    unknown = set(options.replicas) - {case.name for case in cases}
    if unknown:
        raise SystemExit(f"no replica is called {', '.join(sorted(unknown))}")
    rows = read_rows(options.out)
    order = {(case.name, engine): None for case in cases for engine in PACKAGES}
    started = time.perf_counter()
    for case in cases:
        if options.replicas and case.name not in options.replicas:
            continue
        for engine in (options.engine,) if options.engine else PACKAGES:
            row = describe(engine, case)
            rows[case.name, engine] = row
            write_rows(options.out, (rows[key] for key in order if key in rows))
            told = " ".join(row.get(key, "") for key in FIELDS[:-1])
            print(f"{time.perf_counter() - started:.0f} s: {told}", flush=True)
    print(summarise({key: rows[key] for key in order if key in rows}))


if __name__ == "__main__":
    main()
