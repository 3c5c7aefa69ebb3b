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

import importlib
import importlib.metadata
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

import prunus
from benchmarks.apart import FailedError, StoppedError, run_apart
from benchmarks.peers import case_models, engines
from benchmarks.peers.judge import Outcome, judge
from benchmarks.rows import Row, Table

LIMIT = 60
SHARE = 0.5
PACKAGES = {"prunus": "prunus", "torch-pruning": "torch-pruning",
            "torch-pruning+hints": "torch-pruning", "torch-kirigami": "torch-kirigami"}  # fmt: skip
CASES = {case.name: case for case in case_models.CASES}
ORDER = {(name, engine): n for n, (name, engine) in enumerate(
    (name, engine) for name in CASES for engine in PACKAGES)}  # fmt: skip
TABLE = Table(
    "cases.csv",
    ("case", "replica", "engine", "verdict", "param_ratio", "seconds", "reason", "version"),
    ("replica", "engine"),
    lambda row: ORDER.get((row["replica"], row["engine"]), len(ORDER)),
)


def run_prunus(model: Any, args: Any, kwargs: Any) -> Any:
    """Ours, asked for as much; judged by its own proof, and by the measure of the others."""

    def prune(twin: Any) -> Any:
        graph = prunus.trace(twin, args, kwargs)
        chosen = prunus.plan(graph, twin, ratio=SHARE, importance="l2")
        if not chosen.keep:
            raise RuntimeError("nothing is prunable")
        plans.append(chosen)
        return prunus.apply(chosen, twin)

    plans: list[Any] = []
    found = judge(model, args, kwargs, prune)
    if not plans or found.verdict == "inexact":
        return found
    proof = prunus.verify(plans[0], model, args, kwargs, each_group=False)
    verdict = "not judged" if proof.verdict == "not verified" else proof.verdict
    return replace(found, verdict=verdict, rel_err=proof.rel_err, reason=proof.reason)


ENGINES: dict[str, Callable[..., Any]] = {"prunus": run_prunus, **engines.PEERS}


def examine(engine: str, name: str, options: dict[str, Any]) -> Any:
    """In the process of one row."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    args, kwargs = CASES[name].example()
    return ENGINES[engine](model, args, kwargs, **options)


def measure(engine: str, name: str, **options: Any) -> Any:
    """The outcome of one row, or nothing if it did not finish."""
    try:
        # Forked, since importing every library anew for each of some hundred rows takes longer.
        return run_apart(examine, engine, name, options, start="fork", seconds=LIMIT)
    except StoppedError:
        return None
    except FailedError as error:
        return Outcome("failed", reason=f"the benchmark: {error}")


def describe(engine: str, name: str) -> Row:
    """One row of the table."""
    found, note = measure(engine, name), ""
    if found is None and engine == "torch-kirigami":
        note = f"scoring did not finish in {LIMIT} s, without it: "
        found = measure(engine, name, scored=False)
    row = {
        "case": CASES[name].number,
        "replica": name,
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


def prepare() -> None:
    """Import what the rows need, once."""
    for key, value in (("HF_HUB_OFFLINE", "1"), ("YOLO_OFFLINE", "true"),
                       ("YOLO_AUTOINSTALL", "false")):  # fmt: skip
        os.environ.setdefault(key, value)
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="prunus-yolo-"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("timm", "transformers", "ultralytics", "torch_pruning", "torch_kirigami.pruning"):
        importlib.import_module(name)


def summarise(rows: Iterable[Row]) -> str:
    """Verdicts by engine."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["engine"], Counter())[row["verdict"]] += 1
    return "\n".join(f"{engine}: {dict(count.most_common())}" for engine, count in counts.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the replicas asked for, engines in turn; every row is saved at once."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("replicas", nargs="*", help="names; all without")
    parser.add_argument("--engine", choices=tuple(PACKAGES), help="only this one")
    options = parser.parse_args(argv)
    unknown = set(options.replicas) - set(CASES)
    if unknown:
        raise SystemExit(f"no replica is called {', '.join(sorted(unknown))}")
    prepare()
    for name in options.replicas or CASES:
        for engine in (options.engine,) if options.engine else PACKAGES:
            options.table.add(describe(engine, name))
    print(summarise(options.table.read()))


if __name__ == "__main__":
    main()
