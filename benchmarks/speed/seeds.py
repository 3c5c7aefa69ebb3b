"""How much of a promised speed-up arrives, with and without alignment; ``results/seeds.csv``.

    python -m benchmarks.speed.seeds   # three minutes, on a quiet machine
    python -m benchmarks.speed.seeds --again  # also the rows of this commit

What the field began with, on ResNet-50 at batch 1 and 224 pixels, one thread: 40 % of the filters
of every layer removed, and 70 % of all weights; by L2 norm, widths as they come, and as multiples
of 16.  Beside them Torch-Pruning with the ratio at which its plan has the MACs of ours without
alignment, within 1 %.  All of a recipe run in turn; a race in which dense against dense differs by
more than 3 % is void and repeated.  ``share``, the part of the promise that arrives, is
macs_ratio ÷ time_ratio.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import prunus
from benchmarks.rows import commit, read, replace
from benchmarks.speed.racing import BACKENDS, Run, control, forward_of, trusted_race

RESULTS = Path(__file__).parents[1] / "results" / "seeds.csv"
FIELDS = (
    "recipe", "backend", "engine", "round_to", "params_left", "macs_ratio", "time_ratio", "share",
    "dense_ms", "dense_vs_dense", "pairs", "commit",
)  # fmt: skip
KEY = ("recipe", "backend", "engine", "round_to")
PAIRS = 15
ALIGNED = 16
CLOSE = 0.01
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

    def theirs(self, macs: int) -> nn.Module:
        """Cut by Torch-Pruning, by the ratio that leaves so many MACs."""
        low, high = 0.0, 1.0
        for _ in range(12):
            share = (low + high) / 2
            twin = self.prune(share)
            left = self.count(twin)["macs"]
            if abs(left / macs - 1) <= CLOSE:
                break
            low, high = (share, high) if left > macs else (low, share)
        return twin

    def prune(self, share: float) -> nn.Module:
        """Cut by Torch-Pruning."""
        import torch_pruning

        twin = copy.deepcopy(self.model)
        torch_pruning.pruner.BasePruner(
            twin,
            self.images,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[twin.fc],
            # Its default dicts are shared by all pruners of a process, and it writes to them.
            out_channel_groups={},
            in_channel_groups={},
        ).step()
        return twin

    def contestants(self, recipe: str) -> dict[tuple[str, int], nn.Module]:
        """By engine and multiple."""
        free = self.ours(recipe, 1)
        return {
            ("prunus", 1): free,
            ("prunus", ALIGNED): self.ours(recipe, ALIGNED),
            ("torch-pruning", 1): self.theirs(self.count(free)["macs"]),
        }


def measure(
    seeds: Seeds, recipe: str, models: dict[tuple[str, int], nn.Module], backend: str
) -> Iterator[dict[str, Any]]:
    """The rows of one race."""

    def prepare(model: nn.Module) -> Run:
        return forward_of(model, seeds.images, backend)

    dense = prepare(seeds.model)
    seconds = trusted_race(dense, dense, [prepare(model) for model in models.values()], PAIRS)
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
            "pairs": PAIRS,
            "commit": commit(),
        }


def main() -> None:
    """Measure what has no row of this commit, each recipe and backend in one race."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", action="store_true", help="also what this commit has measured")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = {(r["recipe"], r["backend"]) for r in read(RESULTS) if r["commit"] == commit()}
    seeds = Seeds()
    for recipe in RECIPES:
        left = [b for b in BACKENDS if options.again or (recipe, b) not in done]
        models = seeds.contestants(recipe) if left else {}
        for backend in left:
            rows = list(measure(seeds, recipe, models, backend))
            print(*rows, sep="\n", flush=True)
            replace(RESULTS, FIELDS, KEY, rows)


if __name__ == "__main__":
    main()
