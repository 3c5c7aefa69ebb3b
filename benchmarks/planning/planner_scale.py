"""What planning costs beside tracing, at LLaMA-8B's shape; ``results/planner_scale.csv``.

    python -m benchmarks.planning.planner_scale  # four depths: 4, 8, 16 and 32 layers
    python -m benchmarks.planning.planner_scale 32  # one; rows of this commit are not made again

The model has LLaMA-3-8B's widths and no values (it lies on the meta device).  Scores are given:
random numbers of a fixed seed.  ``seconds`` is what :func:`prunus.plan` takes for half of the
parameters under the global scope, ``trace_seconds`` what :func:`prunus.trace` took before, both in
processor time; ``peak_mb`` is the most memory that the process ever held, imports and all.  Every
depth runs in a process of its own.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

import prunus
from benchmarks.apart import peak_mb, run_apart
from benchmarks.rows import Table, commit

TABLE = Table(
    "planner_scale.csv",
    (
        "layers", "units", "seconds", "peak_mb", "trace_seconds", "retained", "bound", "commit",
    ),
    ("layers",),
)  # fmt: skip
LAYERS = (4, 8, 16, 32)
SHARE = 0.5
TOKENS = 128


def llama(layers: int) -> torch.nn.Module:
    """LLaMA-3-8B's widths at a depth, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=4096, intermediate_size=14336, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def measure(layers: int) -> dict[str, Any]:
    """One row."""
    model = llama(layers)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    start = time.process_time()
    graph = prunus.trace(model, kwargs={"input_ids": ids, "use_cache": False})
    traced = time.process_time()
    scores = np.random.default_rng(0).random(graph.unit_count + 1)
    begun = time.process_time()
    plan = prunus.plan(
        graph, model, budget=prunus.Budget(params=SHARE), scope="global",
        round_to=1, max_ratio=1.0,
        importance=lambda group, _: scores[group.units],
    )  # fmt: skip
    return {
        "layers": layers,
        "units": graph.unit_count,
        "seconds": f"{time.process_time() - begun:.2f}",
        "peak_mb": f"{peak_mb():.0f}",
        "trace_seconds": f"{traced - start:.2f}",
        "retained": f"{plan.origin['retained']:.6f}",
        "bound": f"{plan.origin['bound']:.6f}",
        "commit": commit(),
    }


def main() -> None:
    """Measure the depths that have no row of this commit."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("layers", nargs="*", type=int, default=LAYERS)
    options = parser.parse_args()
    done = options.table.done(by=commit())
    for layers in options.layers:
        if (str(layers),) not in done:
            options.table.add(run_apart(measure, layers))


if __name__ == "__main__":
    main()
