"""Memory and time of the tracer against depth: a BERT of 12, 24 and 48 layers.

    python -m benchmarks.speed.depth   # writes results/depth.csv, a minute

Every depth runs in a process of its own, on the meta device, so that what is counted is the
tracer's and not the weights': ``peak_mb`` is the growth of the process from before the trace.
``mb_per_layer`` is what each layer adds beyond the depth before: it stays the same if memory is
linear.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertModel

import prunus
from benchmarks.apart import peak_mb, run_apart
from benchmarks.rows import Table

DEPTHS = (12, 24, 48)
TABLE = Table(
    "depth.csv",
    ("layers", "operators", "units", "trace_s", "group_s", "peak_mb", "mb_per_layer"),
    ("layers",),
)


def measure(layers: int) -> dict[str, Any]:
    """One trace, in this process."""
    torch.set_num_threads(1)
    models = []
    for depth in (1, layers):  # the first loads what an engine loads when it is first used
        with torch.device("meta"):
            models.append(BertModel(BertConfig(num_hidden_layers=depth)).eval())
            ids = torch.zeros(1, 128, dtype=torch.long)
        before = peak_mb()
        graph = prunus.trace(models[-1], ids)
    return {
        "layers": layers,
        "operators": len(graph.program.nodes),
        "units": graph.unit_count,
        "trace_s": round(graph.seconds["trace"], 3),
        "group_s": round(graph.seconds["group"], 3),
        "peak_mb": round(peak_mb() - before, 1),
    }


def main() -> None:
    """Measure every depth in a process of its own."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("layers", nargs="*", type=int, default=DEPTHS, help="from few to many")
    options = parser.parse_args()
    known = {"layers": 0, "peak_mb": 0.0}
    for layers in options.layers:
        row = run_apart(measure, layers)
        per_layer = (row["peak_mb"] - known["peak_mb"]) / (layers - known["layers"])
        options.table.add(row | {"mb_per_layer": round(per_layer, 2)})
        known = row


if __name__ == "__main__":
    main()
