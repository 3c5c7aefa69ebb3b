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

import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import prunus
from benchmarks.exactness import catalogue
from benchmarks.exactness.judges import RATIO, ask_shadow, ask_witness, name_pins, short
from benchmarks.rows import Table, commit
from tests.shadow import as_double

LEFT, LEFT_WITH_HIDDEN_STATE = 0.6, 0.75
TOLERANCE = {"float32": 1e-4, "float64": 1e-6}
ORDER = {name: index for index, name in enumerate(catalogue.names())}
TABLE = Table(
    "exactness.csv",
    (
        "model", "library", "line_holds", "verdict", "groups", "units", "removed", "params_left",
        "rel_err", "dtype", "rel_err64", "witness", "shadow", "moved_min", "not_verified",
        "unverified", "pins", "seconds", "seed", "commit", "reason",
    ),
    ("library", "model"),
    lambda row: ORDER.get(f"{row['library']}:{row['model']}", len(ORDER)),
)  # fmt: skip


def examine(name: str, seed: int = 0) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    library, _, short_name = name.partition(":")
    model, args, kwargs = catalogue.build(name, seed)
    graph = prunus.trace(model, args, kwargs)
    plan = prunus.plan(graph, model, ratio=RATIO, importance="random", seed=seed)
    certificate = prunus.verify(plan, model, args, kwargs, seed=seed)
    moved = certificate.moved_alone.values()
    row: dict[str, Any] = {
        "model": short_name,
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
        "pins": name_pins(graph),
        "reason": certificate.reason[:160],
        "seed": seed,
        "commit": commit(),
    }
    prunus.verifier.randomize(model, args, kwargs, seed=seed)
    row["witness"] = ask_witness(graph, model, args, kwargs, seed=seed)
    row["shadow"] = ask_shadow(plan, model, args, kwargs, tolerance=TOLERANCE["float64"])
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
    wide = as_double(args), as_double(kwargs)
    try:
        double = prunus.verify(plan, model.double(), *wide, each_group=False, seed=seed)
    except (RuntimeError, prunus.PrunusError) as error:
        return f"- ({str(error).splitlines()[0][:40]})"
    return f"{double.rel_err:.1e}" if double.dtype == "float64" else "-"


def main() -> int:
    """Examine the models asked for, one after the other; 1 if one of them fell short."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", help="library:name; all without")
    parser.add_argument("--library", choices=("zoo", "timm", "hf", "yolo"))
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and units")
    options = parser.parse_args()
    table = options.table
    if options.seed:
        table = table.at(table.path.with_stem(f"{table.path.stem}_seed{options.seed}"))
    fell_short = False
    for name in options.models or catalogue.names(options.library):
        try:
            row = examine(name, options.seed)
        except Exception as error:  # a row must say so, and the others must go on
            traceback.print_exc()
            library, _, model = name.partition(":")
            row = {"model": model, "library": library, "verdict": "failed",
                   "line_holds": "no (failed)", "seed": options.seed, "commit": commit(),
                   "reason": short(f"{type(error).__name__}: {error}", 200)}  # fmt: skip
        fell_short |= row["line_holds"] != "yes"
        table.add(row)
    return int(fell_short)


if __name__ == "__main__":
    sys.exit(main())
