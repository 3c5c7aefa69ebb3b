"""Ratios by sensitivity beside equal ones at the same MACs; ``results/sensitivity.csv``.

    python -m benchmarks.planning.sensitivity   # what is missing; some minutes
    python -m benchmarks.planning.sensitivity --table  # print the table that there is

The zoo's ``resnet_fmnist`` keeps at most 70, 50 and 35 % of its MACs, by the importance l2.  Which
share each group loses is equal for all of them; or read from a table of sensitivities, each group
costing the metric as little as any other; or found by 30 trials of Optuna.  The metric is minus the
cross entropy of masked models on the 512 calibration images, which are of the training set.
Accuracy is that on the 2,000 test images that ship with the zoo.  Nothing is trained; with
``recalibrated``, batch norms are measured again on the calibration images, and with ``least squares
+ recalibrated`` what stays was fitted on them to what went before.  The table of sensitivities is
kept in ``results/sensitivity.json``, and a run that was stopped goes on from there; its heat map is
``results/sensitivity.png``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import models_zoo
import prunus
from benchmarks.rows import RESULTS, Table, commit
from models_zoo import data

MODEL = "resnet_fmnist"
LEVELS = (0.7, 0.5, 0.35)
TRIALS = 30
CHOICES = ("equal", "sensitivity", "search")
RECOVERIES = ("cut", "recalibrated", "least squares + recalibrated")
TABLE = Table(
    "sensitivity.csv",
    (
        "ratios", "recovery", "level", "macs_ratio", "accuracy", "dense_accuracy", "images",
        "metric", "evaluations", "commit",
    ),
    ("ratios", "recovery", "level"),
)  # fmt: skip


class Study:
    """The dense network, its graph, and the metric on calibration images."""

    def __init__(self) -> None:
        self.model = models_zoo.build(MODEL, pretrained=True).eval()
        self.inputs = models_zoo.example_inputs(MODEL)[0]
        self.graph = prunus.trace(self.model, self.inputs)
        self.test = data.test()
        self.seen = list(data.batches(*data.calibration()))
        self.inputs_seen = [inputs for inputs, _ in self.seen]
        self.dense = data.accuracy(self.model, *self.test)
        self.macs = prunus.report.measure_costs(self.model, self.inputs)["macs"]

    def metric(self, model: nn.Module) -> float:
        """Minus the cross entropy, a mean over the calibration images."""
        lost = [
            float(nn.functional.cross_entropy(model(x), y, reduction="sum")) for x, y in self.seen
        ]
        return -sum(lost) / sum(len(y) for _, y in self.seen)

    def sensitivity(self) -> prunus.planner.search.Sensitivity:
        """The table, with what its file has."""
        path = RESULTS / "sensitivity.json"
        return prunus.planner.search.sensitivity(
            self.graph, self.model, self.metric, path=path, progress=tell
        )

    def plan(
        self, ratios: str, level: float, table: prunus.planner.search.Sensitivity
    ) -> tuple[prunus.Plan, int]:
        """The plan, and how many masked models it took to find it."""
        budget = prunus.Budget(macs=level)
        if ratios == "equal":
            return prunus.plan(self.graph, self.model, budget=budget, round_to=1), 0
        if ratios == "sensitivity":
            found = prunus.planner.search.plan_by_sensitivity(table, self.graph, self.model, budget)
            return found, sum(len(curve) - 1 for curve in table.curves.values())
        best = prunus.planner.search.search_ratios(
            self.graph, self.model, self.metric, budget=budget, trials=TRIALS, progress=tell
        )
        return best.plan, best.trials

    def row(self, plan: prunus.Plan, recovery: str, **known: Any) -> dict[str, Any]:
        """A row of the table for a plan."""
        small = copy.deepcopy(self.model)
        if recovery.startswith("least squares"):
            prunus.recovery.compensate(small, plan, self.graph, self.inputs_seen)
        else:
            prunus.apply(plan, small)
        if recovery.endswith("recalibrated"):
            prunus.recovery.recalibrate(small, self.inputs_seen)
        small.eval()
        with torch.no_grad():
            metric = self.metric(small)
        left = prunus.report.measure_costs(small, self.inputs)["macs"] / self.macs
        return known | {
            "recovery": recovery,
            "macs_ratio": f"{left:.4f}",
            "accuracy": f"{data.accuracy(small, *self.test):.2f}",
            "dense_accuracy": f"{self.dense:.2f}",
            "images": len(self.test.images),
            "metric": f"{metric:.4f}",
            "commit": commit(),
        }


def tell(text: str, done: int = 0, total: int | None = None) -> None:
    """One line of progress."""
    print(text, flush=True)


def measured(study: Study) -> Iterator[list[dict[str, Any]]]:
    """The rows of every choice of ratios and level that the table lacks."""
    done = TABLE.done()
    table = study.sensitivity()
    prunus.report.draw_sensitivity(
        table,
        RESULTS / "sensitivity.png",
        title=f"{MODEL}: one group at a time, nothing trained",
        metric="minus cross entropy",
    )
    for level in LEVELS:
        for ratios in CHOICES:
            if all((ratios, recovery, str(level)) in done for recovery in RECOVERIES):
                continue
            plan, count = study.plan(ratios, level, table)
            known = {"ratios": ratios, "level": level, "evaluations": count}
            yield [study.row(plan, recovery, **known) for recovery in RECOVERIES]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--table", dest="show", action="store_true", help="only print the table")
    options = parser.parse_args()
    for found in [] if options.show else measured(Study()):
        options.table.add(*found)
    print(options.table.pivot(("ratios", "recovery"), "level", "accuracy"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
