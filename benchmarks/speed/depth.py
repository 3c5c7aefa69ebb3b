"""Memory and time of the tracer against depth: a BERT of 12, 24 and 48 layers.

    python -m benchmarks.speed.depth   # writes results/depth.csv, a minute

Every depth runs in a process of its own, on the meta device, so that what is counted is the
tracer's and not the weights': ``peak_mb`` is the growth of the process from before the trace.
``mb_per_layer`` is what each layer adds beyond the depth before: it stays the same if memory is
linear.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "depth.csv"
DEPTHS = (12, 24, 48)
FIELDS = ("layers", "operators", "units", "trace_s", "group_s", "peak_mb", "mb_per_layer")


def measure(layers: int) -> dict[str, Any]:
    """One trace, in this process."""
    import torch
    from transformers import BertConfig, BertModel

    import prunus

    torch.set_num_threads(1)
    models = []
    for depth in (1, layers):  # the first loads what an engine loads when it is first used
        with torch.device("meta"):
            models.append(BertModel(BertConfig(num_hidden_layers=depth)).eval())
            ids = torch.zeros(1, 128, dtype=torch.long)
        before = _peak_mb()
        graph = prunus.trace(models[-1], ids)
    return {
        "layers": layers,
        "operators": len(graph.program.nodes),
        "units": graph.unit_count,
        "trace_s": round(graph.seconds["trace"], 3),
        "group_s": round(graph.seconds["group"], 3),
        "peak_mb": round(_peak_mb() - before, 1),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure every depth in a process of its own."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows: list[dict[str, Any]] = []
    for layers in DEPTHS:
        command = [sys.executable, __file__, str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        more = row["peak_mb"] - (rows[-1]["peak_mb"] if rows else 0)
        row["mb_per_layer"] = round(more / (layers - (rows[-1]["layers"] if rows else 0)), 2)
        rows.append(row)
        print(row, flush=True)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
