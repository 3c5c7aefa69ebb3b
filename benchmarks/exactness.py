"""Hold models to the exactness line and write ``results/exactness.csv``.

    python benchmarks/exactness.py                     # all models, about ten minutes
    python benchmarks/exactness.py timm:resnet50       # some; their rows are replaced
    python benchmarks/exactness.py --library hf

About 30 % of the units of every group go, all groups at once, and the pruned model's own forward
is compared with the masked original: in float32, in float64 where the model runs in it, and with
the second witness for the groups that nothing mixes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import catalogue
import numpy as np
import torch

import prunus

RESULTS = Path(__file__).with_name("results") / "exactness.csv"
RATIO = 0.3
FIELDS = (
    "model", "library", "groups", "units", "removed", "params_left", "rel_err", "rel_err64",
    "moved_min", "not_verified", "pins", "verdict", "witness", "seconds", "reason",
)  # fmt: skip
EXPECTED_PINS = ("a convolution needs every position", "keeps its shape")


def unmixed(group: Any, context: Any) -> Any:
    """An importance that leaves alone every group whose units see one another."""
    generator = np.random.default_rng(context.seed + group.size)
    return np.full(group.size, np.inf) if group.mixing else generator.random(group.size)


def examine(name: str) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    library, _, short = name.partition(":")
    row: dict[str, Any] = {"model": short, "library": library}
    model, args, kwargs = catalogue.build(name)
    graph = prunus.trace(model, args, kwargs)
    plan = prunus.plan(graph, model, ratio=RATIO, importance="random")
    certificate = prunus.verify(plan, model, args, kwargs)
    moved = [value for value in certificate.moved_alone.values() if value > 1e-3]
    row |= {
        "groups": len(graph.groups),
        "units": graph.unit_count,
        "removed": sum(len(choice.removed) for choice in plan.groups),
        "params_left": f"{certificate.params[1] / certificate.params[0]:.3f}",
        "rel_err": f"{certificate.rel_err:.1e}",
        "rel_err64": _double(name, plan),
        "moved_min": f"{min(moved, default=0):.1e}",
        "not_verified": len(certificate.unverified),
        "pins": _pins(graph),
        "verdict": certificate.verdict,
        "witness": _witness(graph, model, args, kwargs),
        "reason": certificate.reason[:160],
    }
    row["seconds"] = f"{time.perf_counter() - started:.0f}"
    return row


def _double(name: str, plan: prunus.Plan) -> str:
    model, args, kwargs = catalogue.build(name)
    try:
        double = prunus.verify(plan, model.double(), *_as_double(args, kwargs), each_group=False)
    except (RuntimeError, prunus.PrunusError) as error:
        return f"- ({str(error).splitlines()[0][:40]})"
    return f"{double.rel_err:.1e}" if double.dtype == "float64" else "-"


def _as_double(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tuple(cast(value) for value in args), {k: cast(v) for k, v in kwargs.items()}


def _witness(graph: prunus.CouplingGraph, model: Any, args: Any, kwargs: Any) -> str:
    plan = prunus.plan(graph, model, ratio=RATIO, importance=unmixed)
    if not plan.keep:
        return "none (all groups mix)"
    model = copy.deepcopy(model)
    prunus.listen(model, args, kwargs)
    pruned = prunus.apply(plan, copy.deepcopy(model))
    found = prunus.testify(plan, model, pruned, args, kwargs, outputs=graph.kept_outputs)
    error = "" if math.isnan(found.rel_err) else f" {found.rel_err:.1e}"
    reason = f" ({found.reason[:80]})" if found.reason else ""
    return f"{found.verdict}{error}{reason}"


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
    options = parser.parse_args()
    chosen = options.models or catalogue.names(options.library)
    rows = {}
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = {f"{row['library']}:{row['model']}": row for row in csv.DictReader(file)}
    for name in chosen:
        try:
            rows[name] = examine(name)
        except Exception as error:  # a row must say so, and the others must go on
            traceback.print_exc()
            library, _, short = name.partition(":")
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
            rows[name] = {"model": short, "library": library, "verdict": "failed", "reason": reason}
        print({k: v for k, v in rows[name].items() if k != "pins"}, flush=True)
        order = {known: index for index, known in enumerate(catalogue.names())}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows, key=lambda k: order.get(k, 999)))


if __name__ == "__main__":
    main()
