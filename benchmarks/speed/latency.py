"""Budgets of latency, met by the clock; ``results/latency.csv``.

    python -m benchmarks.speed.latency --photos FOLDER   # what is missing: half an hour
    python -m benchmarks.speed.latency resnet50 --backend eager

Batch 1, one thread.  A plan is made for a part of the dense time, and its cut model timed here by
a race that shares no code with the planner: dense, dense and pruned in turn, in 45 rounds,
by the processor time of the thread; where dense against dense differs by more than 3 %, all are
void and repeated.  ``multiple`` of widths and ``trials`` are what the search took, in ``seconds``.

MobileNetV2 has its real weights (``oneshot_pretrained.py`` says how to get these and the photos):
it is scored by ``obs`` in the global scope, repaired as by ``shrink``, and ``agreement`` is that
of the top-1 answers with the dense model's on photos that nothing was calibrated on, in per cent.
ResNet-50 is untrained; its scores are drawn, as uneven as those of trained layers, and ``retained``
is the part of all scores that is kept.
"""

from __future__ import annotations

import argparse
import copy
import time
import zlib
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import models_zoo
import prunus
from benchmarks import rows
from benchmarks.accuracy import oneshot_pretrained, photos
from benchmarks.speed import racing
from prunus.errors import BudgetError
from prunus.recovery import cut_and_recover

TABLE = rows.Table(
    "latency.csv",
    (
        "model", "backend", "requested", "measured_ratio", "multiple", "macs_left", "retained",
        "agreement", "trials", "seconds", "dense_ms", "dense_vs_dense", "commit",
    ),
    ("model", "backend", "requested"),
)  # fmt: skip
REQUESTS = (0.75, 0.5)
MODELS = ("mobilenetv2", "resnet50")


def draw_scores(group: Any, context: Any) -> np.ndarray:
    """Scores as uneven as those of trained layers, the mean of every group one."""
    generator = np.random.default_rng(zlib.crc32(group.name.encode()) + context.seed)
    drawn = generator.lognormal(0.0, 0.5, group.size)
    return drawn / drawn.mean()


class Contest:
    """A model, and what plans of it are made with."""

    def __init__(self, name: str, asked: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.asked = asked
        self.subject = None
        self.options: dict[str, Any] = {"importance": draw_scores, "scope": "global"}
        if name == "mobilenetv2":
            self.subject = oneshot_pretrained.mobilenetv2(asked.photos, torch.device("cpu"))
            self.model, self.images = self.subject.model, self.subject.args[0]
            self.options |= {"importance": "obs", "data": self.subject.batches}
        else:
            self.model = models_zoo.build(name).eval()
            self.images = torch.randn(1, 3, 224, 224)
            # Else numbers vanish, and slow is what is tiny.
            prunus.recovery.recalibrate(self.model, [self.images])
        self.graph = prunus.trace(self.model, self.images)

    def row(self, backend: str, requested: float) -> dict[str, str]:
        """The row of one request, without its key."""
        started = time.monotonic()
        budget = prunus.Budget(latency=requested, timer=backend)
        plan = prunus.plan(self.graph, self.model, budget=budget, **self.options)
        taken = time.monotonic() - started
        pruned = prunus.apply(plan, copy.deepcopy(self.model))
        dense, small = (racing.forward_of(m, self.images, backend) for m in (self.model, pruned))
        seconds = racing.trusted_race(dense, dense, [small], self.asked)
        found = plan.origin["latency"]
        return {
            "measured_ratio": f"{median(seconds[:, 2] / seconds[:, 0]):.4f}",
            "multiple": found["multiple"],
            "macs_left": f"{plan.cost('macs').share:.4f}",
            "retained": f"{found['retained']:.4f}",
            "agreement": self.agreement(plan),
            "trials": str(len(found["trials"])),
            "seconds": f"{taken:.0f}",
            "dense_ms": f"{1e3 * median(seconds[:, 0]):.2f}",
            "dense_vs_dense": f"{racing.control(seconds):.4f}",
            "commit": rows.commit(),
        }

    def agreement(self, plan: prunus.Plan) -> str:
        """Of a repaired copy with the dense model, where there are photos."""
        if self.subject is None:
            return ""
        small, data = copy.deepcopy(self.model), self.subject.batches
        cut_and_recover(small, plan, self.graph, data)
        return f"{self.subject.judge(small):.1f}"


def main() -> None:
    """Measure what has no row of this commit, each row written at once."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--request", nargs="*", type=float, default=REQUESTS, metavar="SHARE")
    parser.add_argument("--backend", action="append", choices=racing.BACKENDS)
    parser.add_argument("--photos", type=Path, default=photos.FOLDER, metavar="FOLDER")
    racing.ask_how_to_race(parser, pairs=45)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = options.table.done(by=rows.commit())
    for name in options.models:
        contest = Contest(name, options)
        for key in product([name], options.backend or racing.BACKENDS, options.request):
            if tuple(map(str, key)) in done:
                continue
            try:
                row = contest.row(*key[1:])
            except (racing.BusyError, BudgetError) as error:  # the next call makes the row
                print(f"{key}: {error}", flush=True)
                continue
            options.table.add(dict(zip(TABLE.key, map(str, key), strict=True)) | row)


if __name__ == "__main__":
    main()
