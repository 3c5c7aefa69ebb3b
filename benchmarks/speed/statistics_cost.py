"""What second moments and the solve cost beside a plain forward; ``results/statistics_cost.csv``.

    python -m benchmarks.speed.statistics_cost   # ResNet-50, 256 images of 224 × 224

Half of the units of every group go.  Seconds are those of the processor, on one thread, and
``peak_mb`` is the growth of a process that does this alone, the model and the images already
there.  The forward is the same model on the same batches.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import models_zoo
import prunus
from benchmarks import rows

RESULTS = Path(__file__).parents[1] / "results" / "statistics_cost.csv"
FIELDS = ("model", "images", "side", "what", "seconds", "times_forward", "peak_mb", "commit")
KEY = ("model", "images", "side", "what")
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
    before = _peak_mb()
    seconds = {"forward": _forward, "pass": _pass, "solve": _solve}[what](model, graph, plan, data)
    return {"what": what, "seconds": round(seconds, 2), "peak_mb": round(_peak_mb() - before)}


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


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Every measurement in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--only", choices=("forward", "pass", "solve"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(measure(options.only, options.images, options.side)))
        return
    plain = 0.0
    for what in ("forward", "pass", "solve"):
        asked = ["--only", what, "--images", str(options.images), "--side", str(options.side)]
        told = subprocess.run(
            [sys.executable, __file__, *asked], check=True, capture_output=True, text=True
        )
        found = json.loads(told.stdout.splitlines()[-1])
        plain = plain or found["seconds"]
        ratio = f"{found['seconds'] / plain:.2f}"
        row = found | {"model": MODEL, "images": options.images, "side": options.side}
        row |= {"times_forward": ratio, "commit": rows.commit()}
        rows.replace(RESULTS, FIELDS, KEY, [row])
        print(" ".join(str(row[name]) for name in FIELDS), flush=True)


if __name__ == "__main__":
    main()
