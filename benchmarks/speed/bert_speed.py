"""How much of the promised speed-up of a pruned BERT-base arrives; ``results/bert_speed.csv``.

    python -m benchmarks.speed.bert_speed   # ten minutes, on a quiet machine
    python -m benchmarks.speed.bert_speed --pairs 5 --out FILE  # a try

Eight sentences of 128 tokens, random weights (their values change no time), eager, float32.  In
every round the dense model, the pruned one and a second copy of the dense one run in turn, each
round in another order; ``time_ratio`` is the median over the rounds of pruned ÷ dense, and
``dense_vs_dense`` of copy ÷ dense.  Where the latter is off by more than 3 %, the run is void and
is repeated.  ``macs_ratio`` is counted by PyTorch (prunus.report.measure_costs), attention
included; the ``share`` of the promise that arrives is macs_ratio ÷ time_ratio.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

import prunus
from benchmarks.accuracy import heads
from benchmarks.rows import Table, commit
from benchmarks.speed.racing import ask_how_to_race, control, trusted_race

BATCH, TOKENS = 8, 128
FFN = "*.intermediate.dense.weight[0]"
TABLE = Table(
    "bert_speed.csv",
    (
        "structure", "macs_ratio", "time_ratio", "share", "dense_vs_dense", "pairs", "threads",
        "commit",
    ),
    ("structure", "threads"),
)  # fmt: skip


def thirty_percent_of_heads(graph: prunus.CouplingGraph, model: Any) -> prunus.Plan:
    """43 of 144 heads: three or four of the twelve of each layer."""
    return heads.plan_heads(graph, model, 0.3, importance="random", scope="local")


def half_of_heads_and_ffn(graph: prunus.CouplingGraph, model: Any) -> prunus.Plan:
    """Six heads and 1536 hidden units of every layer."""

    def chosen(group: Any, context: Any) -> Any:
        ends = (heads.HEADS[1:], FFN[1:])
        return np.full(group.size, 1.0 if group.name.endswith(ends) else np.inf)

    return prunus.plan(graph, model, ratio=0.5, importance=chosen)


STRUCTURES: dict[str, Callable[[prunus.CouplingGraph, Any], prunus.Plan]] = {
    "30 % of heads": thirty_percent_of_heads,
    "50 % of heads and FFN": half_of_heads_and_ffn,
}


def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    """BERT-base with random weights, and full sentences for it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, TOKENS))
    return BertModel(BertConfig()).eval(), {"input_ids": ids}


def measure(structure: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row, of the first race that is not void."""
    dense, inputs = bert()
    plan = STRUCTURES[structure](prunus.trace(dense, (), inputs), dense)
    pruned, twin = prunus.apply(plan, copy.deepcopy(dense)), copy.deepcopy(dense)
    macs = [prunus.report.measure_costs(model, (), inputs)["macs"] for model in (dense, pruned)]
    runs = [partial(model, **inputs) for model in (dense, twin, pruned)]
    seconds = trusted_race(*runs[:2], runs[2:], options)
    ratio = median(seconds[:, 2] / seconds[:, 0])
    return {
        "structure": structure,
        "macs_ratio": f"{macs[1] / macs[0]:.4f}",
        "time_ratio": f"{ratio:.4f}",
        "share": f"{macs[1] / macs[0] / ratio:.3f}",
        "dense_vs_dense": f"{control(seconds):.4f}",
        "pairs": options.pairs,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def main() -> None:
    """Measure the structures asked for."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("structures", nargs="*", default=list(STRUCTURES), metavar="STRUCTURE")
    ask_how_to_race(parser, pairs=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for structure in options.structures:
        options.table.add(measure(structure, options))


if __name__ == "__main__":
    main()
