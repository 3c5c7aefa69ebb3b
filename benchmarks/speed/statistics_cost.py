"""What second moments and the solve cost beside a plain forward; ``results/statistics_cost.csv``.

    python -m benchmarks.speed.statistics_cost   # ResNet-50, 256 images of 224 × 224

Half of the units of every group go.  Seconds are those of the processor, on one thread, and
``peak_mb`` is the growth of a process that does this alone, the model and the images already
there.  The forward is the same model on the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import models_zoo
import prunus
from benchmarks.apart import peak_mb, run_apart
from benchmarks.rows import Table, commit

TABLE = Table(
    "statistics_cost.csv",
    (
        "model", "images", "side", "what", "seconds", "times_forward", "peak_mb", "commit",
    ),
    ("model", "images", "side", "what"),
)  # fmt: skip
MODEL, IMAGES, SIDE, BATCH = "resnet50", 256, 224, 32


def measure(what: str, images: int, side: int) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models_zoo.build(MODEL).eval()
    data = list(torch.randn(images, 3, side, side).split(BATCH))
    graph = prunus.trace(model, data[0][:1])
    plan = prunus.plan(graph, model, ratio=0.5)
    with torch.no_grad():
        model(data[0][:1])  # what is loaded and laid out once
    before = peak_mb()
    seconds = {"forward": _forward, "pass": _pass, "solve": _solve}[what](model, graph, plan, data)
    return {"what": what, "seconds": round(seconds, 2), "peak_mb": round(peak_mb() - before)}


def _forward(model: Any, graph: Any, plan: Any, data: Sequence[Any]) -> float:
    started = time.process_time()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return time.process_time() - started


def _pass(model: Any, graph: Any, plan: Any, data: Sequence[Any]) -> float:
    started = time.process_time()
    prunus.importance.collect(model, graph, data, "second_moment", plan=plan)
    return time.process_time() - started


def _solve(model: Any, graph: Any, plan: Any, data: Sequence[Any]) -> float:
    seen = prunus.importance.collect(model, graph, data, "second_moment", plan=plan)
    started = time.process_time()
    prunus.recovery.compensate(model, plan, graph, statistics=seen)
    return time.process_time() - started


def main() -> None:
    """Every measurement in a process of its own."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    plain = 0.0
    for what in ("forward", "pass", "solve"):
        found = run_apart(measure, what, options.images, options.side)
        plain = plain or found["seconds"]
        row = found | {"model": MODEL, "images": options.images, "side": options.side}
        ratio = f"{found['seconds'] / plain:.2f}"
        options.table.add(row | {"times_forward": ratio, "commit": commit()})


if __name__ == "__main__":
    main()
