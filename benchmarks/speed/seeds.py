"""How much of a promised speed-up arrives, with and without alignment; ``results/seeds.csv``.

    python -m benchmarks.speed.seeds   # three minutes, on a quiet machine
    python -m benchmarks.speed.seeds --again  # also the rows of this commit

What the field began with, on ResNet-50 at batch 1 and 224 pixels, one thread: 40 % of the filters
of every layer removed, and 70 % of all weights; by L2 norm, widths as they come, and as multiples
of 16.  Beside them Torch-Pruning with the least ratio at which its plan has no more MACs than ours
without alignment.  All of a recipe run in turn; a race in which dense against dense differs by
more than 3 % is void and repeated.  ``share``, the part of the promise that arrives, is
macs_ratio ÷ time_ratio.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

import prunus
from benchmarks.peers import bounded
from benchmarks.rows import Table, commit
from benchmarks.speed.racing import (
    BACKENDS,
    Run,
    ask_how_to_race,
    control,
    forward_of,
    trusted_race,
)

TABLE = Table(
    "seeds.csv",
    (
        "recipe", "backend", "engine", "round_to", "params_left", "macs_ratio", "time_ratio",
        "share", "dense_ms", "dense_vs_dense", "pairs", "commit",
    ),
    ("recipe", "backend", "engine", "round_to"),
)  # fmt: skip
ALIGNED = 16
RECIPES: dict[str, dict[str, Any]] = {
    "40 % of filters": {"ratios": {"*": 0.4}},
    "70 % of weights": {"budget": prunus.Budget(params=0.3)},
}


class Seeds:
    """ResNet-50, and what becomes of it."""

    def __init__(self) -> None:
        import timm

        torch.manual_seed(0)
        self.model = timm.create_model("resnet50").eval()
        self.images = torch.randn(1, 3, 224, 224)
        prunus.recovery.recalibrate(
            self.model, [self.images]
        )  # else numbers vanish, and tiny ones are slow
        self.graph = prunus.trace(self.model, self.images)
        self.dense = self.count(self.model)

    def count(self, model: nn.Module) -> dict[str, int]:
        """Its params and MACs, counted by PyTorch."""
        return prunus.report.measure_costs(model, self.images)

    def ours(self, recipe: str, round_to: int) -> nn.Module:
        """Cut by a plan of ours."""
        plan = prunus.plan(self.graph, self.model, round_to=round_to, **RECIPES[recipe])
        return prunus.apply(plan, copy.deepcopy(self.model))

    def contestants(self, recipe: str) -> dict[tuple[str, int], nn.Module]:
        """By engine and multiple."""
        free = self.ours(recipe, 1)
        return {
            ("prunus", 1): free,
            ("prunus", ALIGNED): self.ours(recipe, ALIGNED),
            ("torch-pruning", 1): bounded.torch_pruning(
                self.model, self.images, self.count(free)["macs"], criterion="l2", scope="local"
            ),
        }


def measure(
    seeds: Seeds,
    recipe: str,
    models: dict[tuple[str, int], nn.Module],
    backend: str,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The rows of one race."""

    def prepare(model: nn.Module) -> Run:
        return forward_of(model, seeds.images, backend)

    dense = prepare(seeds.model)
    seconds = trusted_race(dense, dense, [prepare(model) for model in models.values()], options)
    for column, ((engine, multiple), model) in enumerate(models.items(), 2):
        costs = seeds.count(model)
        ratio = median(seconds[:, column] / seconds[:, 0])
        macs = costs["macs"] / seeds.dense["macs"]
        yield {
            "recipe": recipe,
            "backend": backend,
            "engine": engine,
            "round_to": multiple,
            "params_left": f"{costs['params'] / seeds.dense['params']:.4f}",
            "macs_ratio": f"{macs:.4f}",
            "time_ratio": f"{ratio:.4f}",
            "share": f"{macs / ratio:.3f}",
            "dense_ms": f"{1e3 * median(seconds[:, 0]):.2f}",
            "dense_vs_dense": f"{control(seconds):.4f}",
            "pairs": options.pairs,
            "commit": commit(),
        }


def main() -> None:
    """Measure what has no row of this commit, each recipe and backend in one race."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--again", action="store_true", help="also what this commit has measured")
    ask_how_to_race(parser, pairs=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = set() if options.again else {key[:2] for key in options.table.done(by=commit())}
    seeds = Seeds()
    for recipe in RECIPES:
        left = [backend for backend in BACKENDS if (recipe, backend) not in done]
        models = seeds.contestants(recipe) if left else {}
        for backend in left:
            options.table.add(*measure(seeds, recipe, models, backend, options))


if __name__ == "__main__":
    main()
