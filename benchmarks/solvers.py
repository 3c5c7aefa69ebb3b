"""What the allocation of a budget is worth in accuracy; ``results/solvers.csv``.

    python benchmarks/solvers.py --data FOLDER        # twenty minutes

The zoo's residual network on Fashion-MNIST, units ranked by ``obs``, cut to 70, 50, 35 and 25 % of
its MACs and repaired by least squares and recalibration, as in ``oneshot_fmnist.py``: every group
loses the same ratio (*local*), or the budget is shared out by the curves of error versus width, by
prices, by dynamic programming, or by SPDY's search, which compares ``TRIALS`` repaired networks on
some of the calibration images.  A seed is a draw of these.  ``off`` is how far the outputs of the
repaired network are from the dense one's on the calibration images, relative; ``accuracy`` is on
all test images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oneshot_grid
import rows
import torch
from oneshot_fmnist import Study, ask
from torch import Tensor, nn

import prunus

RESULTS = Path(__file__).with_name("results") / "solvers.csv"
FIELDS = (
    "solver", "seed", "level", "macs_ratio", "off", "accuracy", "dense_accuracy", "seconds",
    "images", "commit",
)  # fmt: skip
KEY = ("solver", "seed", "level")
LEVELS = (0.7, 0.5, 0.35, 0.25)
SOLVERS: dict[str, dict[str, Any]] = {
    "local": {"scope": "local"},
    "lagrange": {"scope": "global", "solver": "lagrange"},
    "dynamic": {"scope": "global", "solver": "dynamic"},
    "spdy": {"scope": "global", "solver": "spdy"},
}
TRIALS = 60
SEEDS = 3


def measure(study: Study, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of one draw of calibration images."""
    batches = study.draw(seed)
    seen = prunus.collect(study.model, study.graph, batches, "second_moment", seed=seed)
    dense = oneshot_grid.Calibrated(study.model, study.graph, batches, seen)
    for level in LEVELS:
        for name, options in SOLVERS.items():
            started = time.perf_counter()
            plan = dense.plan(
                "obs", budget=prunus.Budget(macs=level), data=batches, trials=TRIALS, seed=seed,
                round_to=1, max_ratio=1.0, **options,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            model = oneshot_grid.RECOVERIES["least squares + recalibrated"](dense, plan)
            yield study.row(model, solver=name, seed=seed, level=level) | {
                "off": f"{off(study.model, model, batches):.4f}",
                "seconds": f"{seconds:.1f}",
            }


@torch.no_grad()
def off(dense: nn.Module, smaller: nn.Module, batches: list[Tensor]) -> float:
    """√(Σ (y − y₀)² / Σ y₀²)."""
    wanted, found = (torch.cat([model(x) for x in batches]) for model in (dense, smaller))
    return math.sqrt(float((found - wanted).square().sum() / wanted.square().sum()))


def main() -> None:
    """Measure the draws, and replace their rows."""
    study, seeds = ask(__doc__, SEEDS)
    for seed in seeds:
        for row in measure(study, seed):
            rows.replace(RESULTS, FIELDS, KEY, [row])
            print(" ".join(str(row[key]) for key in FIELDS), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
