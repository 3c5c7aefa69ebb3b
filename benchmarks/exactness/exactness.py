"""Hold models to the exactness line and write ``results/exactness.csv``.

    python -m benchmarks.exactness.exactness   # all models, about twenty minutes
    python -m benchmarks.exactness.exactness timm:resnet50  # some; their rows are replaced
    python -m benchmarks.exactness.exactness --library hf
    python -m benchmarks.exactness.exactness --seed 3  # other weights and other units; a new file

About 30 % of the units of every group go, all groups at once, and the pruned model's own forward
is compared with the masked original: in float32, and in float64 where the model runs in it.  Two
judges share no labels with the tracer: the second witness, for the groups that nothing mixes, and
the shadow run (``tests/shadow.py``), for all groups at once in float64.  ``line_holds`` says
whether all that the exactness line asks of a row is so, or else what is not; groups that moved the
output by 1e-3 or less when they went alone are named in ``unverified``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prunus
from benchmarks.exactness import catalogue
from benchmarks.rows import commit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "exactness.csv"
RATIO = 0.3
LEFT, LEFT_WITH_HIDDEN_STATE = 0.6, 0.75
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
MOVED = 1e-3
FIELDS = (
    "model", "library", "line_holds", "verdict", "groups", "units", "removed", "params_left",
    "rel_err", "dtype", "rel_err64", "witness", "shadow", "moved_min", "not_verified",
    "unverified", "pins", "seconds", "seed", "commit", "reason",
)  # fmt: skip
EXPECTED_PINS = ("a convolution needs every position", "keeps its shape")


def unmixed(group: Any, context: Any) -> Any:
    """An importance that leaves alone every group whose units see one another."""
    generator = np.random.default_rng(context.seed + group.size)
    return np.full(group.size, np.inf) if group.mixing else generator.random(group.size)


def examine(name: str, seed: int = 0) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    library, _, short = name.partition(":")
    model, args, kwargs = catalogue.build(name, seed)
    graph = prunus.trace(model, args, kwargs)
    plan = prunus.plan(graph, model, ratio=RATIO, importance="random", seed=seed)
    certificate = prunus.verify(plan, model, args, kwargs, seed=seed)
    moved = certificate.moved_alone.values()
    row: dict[str, Any] = {
        "model": short,
        "library": library,
        "verdict": certificate.verdict,
        "groups": len(graph.groups),
        "units": graph.unit_count,
        "removed": sum(len(choice.removed) for choice in plan.groups),
        "params_left": f"{certificate.params[1] / certificate.params[0]:.3f}",
        "rel_err": f"{certificate.rel_err:.1e}",
        "dtype": certificate.dtype,
        "rel_err64": _double(name, plan, seed),
        "moved_min": f"{min(moved, default=0):.1e}",
        "not_verified": len(certificate.unverified),
        "unverified": "; ".join(certificate.unverified),
        "pins": _pins(graph),
        "reason": certificate.reason[:160],
        "seed": seed,
        "commit": commit(),
    }
    prunus.verifier.randomize(model, args, kwargs, seed=seed)
    row["witness"] = _witness(graph, model, args, kwargs, seed)
    row["shadow"] = _shadow(plan, model, args, kwargs)
    row["line_holds"] = line_holds(row)
    row["seconds"] = f"{time.perf_counter() - started:.0f}"
    return row


def line_holds(row: Mapping[str, Any]) -> str:
    """``yes``, or ``no`` and what the exactness line asks for and the row lacks."""
    hidden = f"{row['library']}:{row['model']}" in catalogue.HIDDEN_STATE
    judges = [str(row[judge]).partition(" ")[0] for judge in ("witness", "shadow")]
    wanted = {
        "verdict": row["verdict"] == "exact",
        "params_left": float(row["params_left"]) <= (LEFT_WITH_HIDDEN_STATE if hidden else LEFT),
        "rel_err": float(row["rel_err"]) <= TOLERANCE.get(row["dtype"], 0),
        "rel_err64": row["rel_err64"].startswith("-")
        or float(row["rel_err64"]) <= TOLERANCE["float64"],
        "no judge agrees": "agrees" in judges,
        "a judge disagrees": "disagrees" not in judges,
    }
    missing = [what for what, holds in wanted.items() if not holds]
    return f"no ({', '.join(missing)})" if missing else "yes"


def _double(name: str, plan: prunus.Plan, seed: int) -> str:
    model, args, kwargs = catalogue.build(name, seed)
    wide = _as_double(args, kwargs)
    try:
        double = prunus.verify(plan, model.double(), *wide, each_group=False, seed=seed)
    except (RuntimeError, prunus.PrunusError) as error:
        return f"- ({str(error).splitlines()[0][:40]})"
    return f"{double.rel_err:.1e}" if double.dtype == "float64" else "-"


def _as_double(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tuple(cast(value) for value in args), {k: cast(v) for k, v in kwargs.items()}


def _witness(graph: prunus.CouplingGraph, model: Any, args: Any, kwargs: Any, seed: int) -> str:
    """What the second witness says of the groups that nothing mixes."""
    from tests.witness import testify

    plan = prunus.plan(graph, model, ratio=RATIO, importance=unmixed, seed=seed)
    if not plan.keep:
        return "none (all groups mix)"
    pruned = prunus.apply(plan, copy.deepcopy(model))
    found = testify(plan, model, pruned, args, kwargs, outputs=graph.kept_outputs)
    error = "" if math.isnan(found.rel_err) else f" {found.rel_err:.1e}"
    reason = f" ({found.reason[:80]})" if found.reason else ""
    return f"{found.verdict}{error}{reason}"


def _shadow(plan: prunus.Plan, model: Any, args: Any, kwargs: Any) -> str:
    """What a forward with a mask beside every tensor says of all groups at once, in float64."""
    from tests import shadow

    pruned = prunus.apply(plan, copy.deepcopy(model)).double()
    try:
        gap = shadow.compare(model, pruned, plan.keep, args, kwargs)
    except (shadow.UndecidedError, RuntimeError) as error:
        return f"undecided ({type(error).__name__}: {error})".replace("\n", " ")[:120]
    return f"{'agrees' if gap <= TOLERANCE['float64'] else 'disagrees'} {gap:.1e}"


def _pins(graph: prunus.CouplingGraph) -> str:
    reasons = Counter(
        pin.reason for _, pin in graph.pins if not any(e in pin.reason for e in EXPECTED_PINS)
    )
    return "; ".join(f"{reason} x{count}" for reason, count in reasons.most_common())


def main() -> None:
    """Examine the models asked for, one after the other, and keep the table sorted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", help="library:name; all without")
    parser.add_argument("--library", choices=("zoo", "timm", "hf", "yolo"))
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and units")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # for ``tests.shadow``
    chosen = options.models or catalogue.names(options.library)
    results = RESULTS
    if options.seed:
        results = RESULTS.with_name(f"exactness_seed{options.seed}.csv")
    rows = {}
    if results.exists():
        with results.open() as file:
            rows = {f"{row['library']}:{row['model']}": row for row in csv.DictReader(file)}
    for name in chosen:
        try:
            rows[name] = examine(name, options.seed)
        except Exception as error:  # a row must say so, and the others must go on
            traceback.print_exc()
            library, _, short = name.partition(":")
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            rows[name] = {"model": short, "library": library, "verdict": "failed",
                          "line_holds": "no (failed)", "reason": reason,
                          "seed": options.seed, "commit": commit()}  # fmt: skip
        print({k: v for k, v in rows[name].items() if k != "pins"}, flush=True)
        order = {known: index for index, known in enumerate(catalogue.names())}
        results.parent.mkdir(exist_ok=True)
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows, key=lambda k: order.get(k, 999)))


if __name__ == "__main__":
    main()
