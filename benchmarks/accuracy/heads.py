"""Attention heads of MiniLM, removed without any training; ``results/heads.csv``, ``heads.png``.

    python -m benchmarks.accuracy.heads   # every importance; a quarter of an hour
    python -m benchmarks.accuracy.heads --importance l2  # some; their rows are replaced
    python -m benchmarks.accuracy.heads --picture  # draw the table that there is again

``ratio`` is the share of all 72 heads that goes, to the nearest head, and one stays in every layer.
``fidelity`` is the Spearman correlation of the cosines of all pairs of 256 sentences, against the
dense model's: mean-pooled, normalised embeddings, as the model is used.  Criteria that need data
see other sentences (``texts.py``).  ``scope`` says whether the heads of all layers compete
(*global*) or every layer loses the same share (*local*).  Random has five seeds.  At 30 % the
removal is also verified: ``verdict`` is the certificate's.

The rows of scope *measured* are ``prune_heads(model, ratio, importance="obs", scope="measured",
recover="sequential", data=…)``: heads are removed a few at a time, from the layers where that moves
the outputs least once the output projections are fitted again, and at last layer after layer is
fitted again (``repair``).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import prunus
from benchmarks.accuracy import measures, pretrained, texts
from benchmarks.rows import Row, Table, commit

MODEL = "all-MiniLM-L6-v2"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
PROVEN = 0.3
SEEDS = range(5)
SCOPES = ("global", "local")
TITLES = {"global": "heads of all layers compete", "local": "every layer loses the same share"}
HEADS = "*.self.query.weight[0]"
TABLE = Table(
    "heads.csv",
    (
        "model", "importance", "scope", "ratio", "removed", "fidelity", "verdict", "seed",
        "sentences", "text", "repair", "commit",
    ),
    ("model", "importance", "scope", "ratio", "seed", "repair"),
)  # fmt: skip
CALIBRATED = ("taylor", "fisher", "head_gradient", "activation", "wanda", "flap")
NEEDS = ("gradient", "head_gradient", "activation")
MEASURED = "measured"
REPAIR = "sequential"
IMPORTANCES = ("random", "l2", *CALIBRATED, MEASURED)


def plan_heads(
    graph: prunus.CouplingGraph, model: Any, ratio: float, *, heads: str = HEADS, **options: Any
) -> prunus.Plan:
    """A plan that removes that share of all heads, to the nearest head, and nothing else.

    All heads of a model cost alike, so the parameters of any so many heads are the budget.
    """
    count, budget = price_heads(graph, ratio, heads)
    plan = prunus.plan(graph, model, budget=budget, include=heads, **options)
    removed = sum(len(choice.removed) for choice in plan.groups)
    if removed != count:
        raise ValueError(f"{removed} units were removed where {count} heads should go")
    return plan


def price_heads(graph: prunus.CouplingGraph, ratio: float, heads: str) -> tuple[int, prunus.Budget]:
    """How many heads are a share of all, and the parameters of the model without so many."""
    groups = [g for g in graph.groups if g.name.endswith(heads.removeprefix("*"))]
    count = round(ratio * sum(group.size for group in groups))
    kept = [True] * (graph.unit_count + 1)
    # One of each group stays: a layer without heads has other costs.
    for unit in [unit for group in groups for unit in group.units[1:].tolist()][:count]:
        kept[unit] = False
    cost = graph.cost("params", torch.tensor(kept).numpy())
    return count, prunus.Budget(params=cost)


class Study:
    """The dense model, what it says, and the two parts of the text."""

    def __init__(self, sentences: int, calibration: int) -> None:
        self.model, tokenizer = pretrained.minilm()
        parts = texts.load()
        self.test = measures.tokenize(texts.sentences(parts.test, sentences), tokenizer)
        self.data = measures.tokenize(
            texts.sentences(parts.calibration, calibration), tokenizer, size=16
        )
        self.sentences = sentences
        self.inputs = {name: tensor[:2] for name, tensor in self.data[0].items()}
        self.graph = prunus.trace(self.model, (), self.inputs)
        self.dense = measures.embed(self.model, self.test)

    def measure(self, importance: str, scope: str, ratio: float, seed: int) -> dict[str, Any]:
        """One row: plan, cut a copy, compare its embeddings with the dense model's."""
        options: dict[str, Any] = {"importance": importance, "scope": scope, "seed": seed}
        if importance in CALIBRATED:
            options["statistics"] = self.statistics
        plan = plan_heads(self.graph, self.model, ratio, **options)
        pruned = prunus.apply(plan, copy.deepcopy(self.model))
        row = {"importance": importance, "scope": scope, "ratio": ratio, "seed": seed}
        row["verdict"] = self._prove(plan) if ratio == PROVEN and seed == 0 else ""
        return self._row(plan, pruned, row)

    def measure_chosen(self, ratio: float) -> dict[str, Any]:
        """One row: the layers chosen by the measured error of the outputs, and repaired."""
        pruned = copy.deepcopy(self.model)
        small = prunus.prune_heads(
            *(pruned, ratio, (), self.inputs),
            importance="obs",
            scope="measured",
            recover=REPAIR,
            data=self.data,
            verified=ratio == PROVEN,
        )
        row = {"importance": "obs", "scope": MEASURED, "ratio": ratio, "seed": 0, "repair": REPAIR}
        row["verdict"] = "" if small.certificate is None else small.certificate.verdict
        return self._row(small.plan, pruned, row)

    def _row(self, plan: prunus.Plan, pruned: Any, row: dict[str, Any]) -> dict[str, Any]:
        fidelity = measures.fidelity(self.dense, measures.embed(pruned, self.test))
        return {
            "model": MODEL,
            "repair": "none",
            **row,
            "removed": sum(len(choice.removed) for choice in plan.groups),
            "fidelity": f"{fidelity:.4f}",
            "sentences": self.sentences,
            "text": texts.SOURCE,
            "commit": commit(),
        }

    @cached_property
    def statistics(self) -> prunus.importance.Statistics:
        """What all criteria that read data need, from one pass over it."""
        return prunus.importance.collect(self.model, self.graph, self.data, NEEDS)

    def _prove(self, plan: prunus.Plan) -> str:
        model = copy.deepcopy(self.model)
        return prunus.verify(plan, model, (), self.inputs, each_group=False).verdict


def draw(table: Sequence[Row], path: Path) -> None:
    """Fidelity against the share of heads removed: a panel a scope, a line an importance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(SCOPES), sharey=True)
    for axes, scope in zip(panels, SCOPES, strict=True):
        for importance in dict.fromkeys(row["importance"] for row in table):
            line = curve(table, importance, scope)
            if line:
                draw_line(axes, importance, line)
        if line := curve(table, "obs", MEASURED):
            label = "obs, layers measured, repaired"
            points = {0.0: 1.0} | {ratio: values[0] for ratio, values in line.items()}
            axes.plot(*zip(*points.items(), strict=True), marker="s", color="black", label=label)
        axes.axhline(0.95, color="#cccccc", linewidth=0.8, zorder=0)
        axes.set_xlabel("share of all heads removed")
        axes.set_title(TITLES[scope], loc="left", fontsize=10)
        axes.xaxis.set_major_formatter("{x:.0%}")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("Spearman correlation with the dense model")
    panels[0].legend(frameon=False, loc="lower left", fontsize=9)
    figure.suptitle(f"{MODEL}: embeddings without some heads, nothing trained", fontsize=11)
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same table, the same bytes


def draw_line(axes: Any, importance: str, line: dict[float, tuple[float, float, float]]) -> None:
    """One importance, from the dense model on; the seeds of random as a grey band."""
    ratios = [0.0, *line]
    middle, low, high = ([1.0, *(values[i] for values in line.values())] for i in range(3))
    if importance == "random":
        axes.plot(ratios, middle, "--", color="#888888", label=f"random, {len(SEEDS)} seeds")
        axes.fill_between(ratios, low, high, color="#888888", alpha=0.2, linewidth=0)
    else:
        colour = f"C{IMPORTANCES.index(importance)}" if importance in IMPORTANCES else None
        axes.plot(ratios, middle, marker="o", markersize=4, color=colour, label=importance)


def curve(
    table: Sequence[Row], importance: str, scope: str
) -> dict[float, tuple[float, float, float]]:
    """Mean, least and greatest fidelity over the seeds, by ratio."""
    found: dict[float, list[float]] = {}
    for row in table:
        if (row["importance"], row["scope"]) == (importance, scope):
            found.setdefault(float(row["ratio"]), []).append(float(row["fidelity"]))
    return {ratio: (mean(v), min(v), max(v)) for ratio, v in sorted(found.items())}


def main() -> int:
    """Measure the importances asked for, and draw; 1 if one of them could not be measured."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--importance", nargs="*", default=IMPORTANCES, metavar="NAME")
    parser.add_argument("--ratio", nargs="*", type=float, default=RATIOS, metavar="R")
    parser.add_argument("--sentences", type=int, default=256, help="to be scored on")
    parser.add_argument("--calibration", type=int, default=256, help="sentences for the criteria")
    parser.add_argument("--picture", action="store_true", help="only draw the table")
    options = parser.parse_args()
    study = None if options.picture else Study(options.sentences, options.calibration)
    failed = 0
    for importance in options.importance if study else ():
        try:
            if importance == MEASURED:
                for ratio in options.ratio:
                    options.table.add(study.measure_chosen(ratio))
                continue
            for scope in SCOPES:
                for seed in SEEDS if importance == "random" else (0,):
                    options.table.add(
                        *(study.measure(importance, scope, r, seed) for r in options.ratio)
                    )
        except (prunus.PrunusError, TypeError) as error:  # the other importances go on
            print(f"{importance} was not measured: {error}", file=sys.stderr)
            failed += 1
    draw(options.table.read(), options.table.path.with_suffix(".png"))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
