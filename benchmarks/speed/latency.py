"""A latency budget, and what a MACs plan of the same time keeps; ``results/latency.csv``.

    python -m benchmarks.speed.latency   # all models, both backends: half an hour
    python -m benchmarks.speed.latency mobilenetv2 --backend eager
    python -m benchmarks.speed.latency --again  # also the rows of this commit

Batch 1, one thread.  A plan is made for a part of the dense time, and its cut model timed here,
by a clock on the wall that shares no code with the planner: dense, pruned, dense in turn, in
45 rounds; where dense against dense differs by more than 3 %, all are void and repeated.
Then the share of MACs is bisected at which a MACs plan, made in the same way but for the budget,
takes that time within 1 %; of nine that don't the nearest counts.  ``kept_importance`` is the kept
part of the sum of all scores.  These are drawn: only one of the models has weights that can be had
offline.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import prunus
from benchmarks.rows import Table, commit
from benchmarks.speed.racing import (
    BACKENDS,
    BusyError,
    Run,
    ask_how_to_race,
    control,
    forward_of,
    trusted_race,
)

TABLE = Table(
    "latency.csv",
    (
        "model", "backend", "requested", "measured_ratio", "kept_importance",
        "kept_importance_macs_plan", "macs_plan_ratio", "macs_left", "macs_plan_macs_left",
        "dense_ms", "dense_vs_dense", "commit",
    ),
    ("model", "backend", "requested"),
)  # fmt: skip
REQUESTS = (0.75, 0.5)
ROUNDS = 15
"""Of the table: what an operator saves with few channels less is a difference of near numbers."""

SAME_TIME = 0.01
"""How near a MACs plan's time has to be: near full widths a percent of the time is worth nearly a
thousandth of the importance, and that is what the two plans differ by."""

MOST_STEPS = 9


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def _yolo() -> nn.Module:
    from models_zoo import build

    return build("yolov8n")


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (_timm("resnet50"), 224),
    "mobilenetv2": (_timm("mobilenetv2_100"), 224),
    "yolov8n": (_yolo, 640),
    "vit_small": (_timm("vit_small_patch16_224"), 224),
}
"""How they are built, and the side of their picture."""


def draw_scores(group: Any, context: Any) -> np.ndarray:
    """Scores as uneven as those of trained layers, the mean of every group one."""
    generator = np.random.default_rng(zlib.crc32(group.name.encode()) + context.seed)
    drawn = generator.lognormal(0.0, 0.5, group.size)
    return drawn / drawn.mean()


class Contest:
    """One model on one backend: plans of it, and their times."""

    def __init__(self, name: str, backend: str, options: argparse.Namespace) -> None:
        self.options = options
        build, side = MODELS[name]
        torch.manual_seed(0)
        self.backend = backend
        self.model = build().eval()
        self.images = torch.randn(1, 3, side, side)
        self.scores: dict[str, np.ndarray] = {}
        prunus.recovery.recalibrate(
            self.model, [self.images]
        )  # else numbers vanish, and slow is what is tiny
        self.graph = prunus.trace(self.model, self.images)
        folder = Path(tempfile.gettempdir()) / f"prunus-latency-{commit()}"
        self.table = prunus.latency.measure(
            self.model, self.images, backend=backend, graph=self.graph, folder=folder, rounds=ROUNDS
        )
        self.dense = self.prepare(self.model)
        self.dense_ms, self.control = 0.0, 1.0

    def plan(self, **budget: float) -> prunus.Plan:
        """The plan for a budget; both kinds with widths as the table wants them."""

        def remember(group: Any, context: Any) -> np.ndarray:
            return self.scores.setdefault(group.name, draw_scores(group, context))

        return prunus.plan(
            self.graph, self.model, budget=prunus.Budget(**budget), latency=self.table,
            importance=remember, scope="global", round_to="latency",
        )  # fmt: skip

    def kept(self, plan: prunus.Plan) -> float:
        """The part of all importance that stays."""
        lost = sum(self.scores[g.name][list(g.removed)].sum() for g in plan.groups)
        return float(1 - lost / sum(scores.sum() for scores in self.scores.values()))

    def time(self, plan: prunus.Plan) -> float:
        """The ratio of the pruned to the dense model's time, once the clock can be trusted."""
        pruned = self.prepare(prunus.apply(plan, copy.deepcopy(self.model)))
        seconds = trusted_race(self.dense, self.dense, [pruned], self.options)
        self.dense_ms, self.control = 1e3 * median(seconds[:, 0]), control(seconds)
        return float(median(seconds[:, 2] / seconds[:, 0]))

    def prepare(self, model: nn.Module) -> Run:
        """The forward of a model on this backend."""
        return forward_of(model, self.images, self.backend)

    def bisect(self, wanted: float, start: float) -> tuple[prunus.Plan, float]:
        """The MACs plan that takes this part of the dense time, and what it takes."""
        low, high, share = 0.0, 1.0, start
        best: tuple[float, prunus.Plan, float] | None = None
        for _ in range(MOST_STEPS):
            plan = self.plan(macs=share)
            ratio = self.time(plan)
            print(f"  MACs at {share:.3f}: {ratio:.3f} of the time", flush=True)
            if best is None or abs(ratio - wanted) < best[0]:
                best = abs(ratio - wanted), plan, ratio
            if abs(ratio / wanted - 1) <= SAME_TIME:
                break
            low, high = (share, high) if ratio < wanted else (low, share)
            guess = share + (wanted - ratio) * (1 - share) / max(1 - ratio, 0.05)
            share = guess if low < guess < high else (low + high) / 2
        assert best is not None
        return best[1], best[2]


def measure(contest: Contest, requested: float) -> dict[str, str]:
    """The row of one request, without its key."""
    fast = contest.plan(latency=requested)
    ratio = contest.time(fast)
    row = {"dense_ms": f"{contest.dense_ms:.2f}", "dense_vs_dense": f"{contest.control:.4f}"}
    share = fast.cost("macs").share
    print(f"  asked for {requested}, took {ratio:.3f} with {share:.3f} of the MACs", flush=True)
    small, took = contest.bisect(ratio, share)
    return {
        "measured_ratio": f"{ratio:.4f}",
        "kept_importance": f"{contest.kept(fast):.4f}",
        "kept_importance_macs_plan": f"{contest.kept(small):.4f}",
        "macs_plan_ratio": f"{took:.4f}",
        "macs_left": f"{share:.4f}",
        "macs_plan_macs_left": f"{small.cost('macs').share:.4f}",
        **row,
        "commit": commit(),
    }


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, list[float]]]:
    """What has no row of this commit yet."""
    there = options.table.done(by=commit())
    for name in options.models:
        for backend in options.backend or BACKENDS:
            left = [r for r in REQUESTS if options.again or (name, backend, f"{r}") not in there]
            if left:
                yield name, backend, left


def main() -> None:
    """Measure what was asked for, and replace its rows as soon as they are there."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--again", action="store_true", help="also what this commit has measured")
    ask_how_to_race(parser, pairs=45)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    for name, backend, left in wanted(options):
        print(f"{name} on {backend}", flush=True)
        contest = Contest(name, backend, options)
        for requested in left:
            key = {"model": name, "backend": backend, "requested": str(requested)}
            try:
                row = key | measure(contest, requested)
            except (BusyError, prunus.errors.BudgetError) as error:  # the next call makes the row
                print(f"  no row: {error}", flush=True)
                continue
            options.table.add(row)
            print(f"after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
