"""Ask for a share of params or MACs, count what came out, and write ``results/budgets.csv``.

    python benchmarks/budgets.py                     # all models of the table
    python benchmarks/budgets.py timm:resnet50       # some; their rows are replaced

What is achieved is counted on the pruned model, not by the planner: parameters by ``numel``,
MACs by PyTorch's FLOP counter, halved.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import catalogue

import prunus

RESULTS = Path(__file__).with_name("results") / "budgets.csv"
FIELDS = ("model", "budget", "requested", "achieved", "round_to", "unaligned", "verdict", "plan_s")
MODELS = (
    "zoo:resnet_fmnist", "zoo:resnet20", "zoo:resnet56", "zoo:resnet18", "zoo:resnet50",
    "zoo:hrnet_w18", "zoo:hrnet_w18_small", "zoo:mobilenetv2", "zoo:yolov8n", "zoo:yolov3_tiny",
    "timm:resnet50", "timm:hrnet_w18_small", "timm:mobilenetv2_100", "timm:efficientnet_b0",
    "timm:densenet121", "timm:resnext50_32x4d", "timm:convnext_atto",
)  # fmt: skip
TOLERANCE = 0.01


def examine(name: str) -> list[dict[str, object]]:
    """Rows of one model: both costs, three sizes, with and without rounding."""
    model, args, kwargs = catalogue.build(name)
    graph = prunus.trace(model, args, kwargs)
    dense = prunus.measure_costs(model, args, kwargs)
    rows: list[dict[str, object]] = []
    for cost in ("params", "macs"):
        for requested in (0.3, 0.5, 0.7):
            for round_to in (1, 8):
                started = time.perf_counter()
                budget = prunus.Budget(**{cost: requested})
                row = {"model": name, "budget": cost, "requested": requested, "round_to": round_to}
                try:
                    plan = prunus.plan(graph, model, budget=budget, round_to=round_to)
                except prunus.PrunusError as refused:
                    rows.append(row | {"verdict": f"refused: {refused}".replace("\n", " ")[:300]})
                    continue
                seconds = time.perf_counter() - started
                pruned = prunus.apply(plan, copy.deepcopy(model))
                achieved = prunus.measure_costs(pruned, args, kwargs)[cost] / dense[cost]
                unaligned = sum(len(stay) % round_to > 0 for stay in plan.keep.values())
                close = round_to > 1 or requested - achieved < TOLERANCE
                good = achieved <= requested and close and not unaligned
                rows.append(row | {
                    "achieved": f"{achieved:.4f}",
                    "unaligned": unaligned,
                    "verdict": "met" if good else "missed",
                    "plan_s": f"{seconds:.2f}",
                })  # fmt: skip
    return rows


def main() -> None:
    """Examine the models asked for and replace their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    chosen = parser.parse_args().models
    rows: list[dict[str, object]] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            rows = [dict(row) for row in csv.DictReader(file)]
    for name in chosen:
        found = examine(name)
        rows = [row for row in rows if row["model"] != name] + found
        missed = [row for row in found if row["verdict"] != "met"]
        print(f"{name}: {len(found) - len(missed)} of {len(found)} met", *missed, flush=True)
        rows.sort(key=lambda row: MODELS.index(str(row["model"])) if row["model"] in MODELS else 99)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
