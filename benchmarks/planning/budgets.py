"""Ask for a share of a cost, count what came out, and write ``results/budgets.csv``.

    python -m benchmarks.planning.budgets   # all models of the table
    python -m benchmarks.planning.budgets resnet50 llama_1b  # some; this commit's rows are kept

What is achieved is counted on the pruned model, not by the planner: parameters by ``numel``,
MACs by PyTorch's FLOP counter, halved, with attention as plain matrix products, bytes as stored,
and peak activation memory by what is alive on fake tensors.  The pruned model is a copy on the
meta device, which has all of this and computes nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import prunus
from benchmarks.exactness import catalogue
from benchmarks.rows import Table, commit
from prunus.graph.axis import Axis

TABLE = Table(
    "budgets.csv",
    (
        "model", "budget", "requested", "round_to", "planned", "achieved", "spare", "unaligned",
        "verdict", "plan_s", "commit",
    ),
    ("model", "budget", "requested", "round_to"),
)  # fmt: skip
SHARES = (0.3, 0.5, 0.7)
BUDGETS = (("params",), ("macs",), ("bytes",), ("params", "macs"), ("activation",))
CLOSE = {1: 0.01, 8: 0.02, 32: 0.04}
"""By what widths are rounded to: how far below the bound the tighter cost may end."""

AGREE = 0.05
"""How far the peak that is counted may be from the planned one, as a part of it."""

WIDE = 64
"""Narrower groups are rounded to 16 where others are to 32."""

Built = tuple[nn.Module, Any, dict[str, Any]]


def _named(name: str) -> Callable[[], Built]:
    return lambda: catalogue.build(name)


def _bert_base() -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (1, 32))
    return BertForSequenceClassification(BertConfig()).eval(), (ids,), {}


def _llama_1b() -> Built:
    """On the meta device, without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros((1, 16), dtype=torch.long)
        mask = torch.zeros((1, 1, 16, 16))  # given, since making one reads values
    return model, (ids,), {"attention_mask": mask, "use_cache": False, "logits_to_keep": 1}


MODELS: dict[str, Callable[[], Built]] = {
    "resnet50": _named("zoo:resnet50"),
    "hrnet_w18": _named("zoo:hrnet_w18"),
    "mobilenetv2": _named("zoo:mobilenetv2"),
    "efficientnet_b0": _named("timm:efficientnet_b0"),
    "yolov8n": _named("zoo:yolov8n"),
    "vit_small": _named("timm:vit_small_patch16_224"),
    "bert_base": _bert_base,
    "llama_1b": _llama_1b,
}


def requests() -> Iterator[dict[str, Any]]:
    """Every combination of costs, share and rounding; peak memory without rounding only."""
    for costs in BUDGETS:
        for share in SHARES:
            for round_to in CLOSE if costs != ("activation",) else (1,):
                yield {"budget": "+".join(costs), "requested": share, "round_to": round_to}


class Subject:
    """One model: its graph, and a twin without values to be cut."""

    def __init__(self, name: str) -> None:
        self.model, self.args, self.kwargs = MODELS[name]()
        self.graph = prunus.trace(self.model, self.args, self.kwargs)
        self.empty = copy.deepcopy(self.model).to("meta")
        self.inputs = tree_map(_to_meta, (self.args, self.kwargs))
        values = all(tensor.device.type != "meta" for tensor in self.model.parameters())
        self.importance = "l2" if values else "random"
        self.dense = self.count(self.empty, peak=True)
        self.widths = widths_of(self.graph)

    def count(self, model: nn.Module, *, peak: bool) -> dict[str, int]:
        """What a model costs, counted from outside."""
        args, kwargs = self.inputs
        found = prunus.report.measure_costs(model, args, kwargs)
        if peak:
            found["activation"] = prunus.report.measure_activation(model, args, kwargs)
        return found

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Plan, cut and count: one row."""
        costs, share = request["budget"].split("+"), request["requested"]
        round_to = request["round_to"]
        started = time.perf_counter()
        try:
            plan = prunus.plan(
                self.graph,
                self.model,
                budget=prunus.Budget(**dict.fromkeys(costs, share)),
                round_to=round_to,
                importance=self.importance,
            )
        except prunus.PrunusError as refused:
            return {"verdict": f"refused: {refused}".replace("\n", " ")[:300]}
        seconds = time.perf_counter() - started
        small = prunus.apply(plan, copy.deepcopy(self.empty))
        counted = self.count(small, peak="activation" in costs)
        planned = {cost: plan.costs[cost][1] / plan.costs[cost][0] for cost in costs}
        achieved = {cost: counted[cost] / self.dense[cost] for cost in costs}
        spare = share - max(achieved.values())
        unaligned = sum(
            len(stay) % (round_to if self.widths[axis] >= WIDE else min(round_to, 16)) > 0
            for axis, stay in plan.keep.items()
            if axis in self.widths
        )
        met = 0 <= spare < CLOSE[round_to] and not unaligned
        if costs == ["activation"]:
            met = abs(achieved["activation"] / planned["activation"] - 1) <= AGREE
        return {
            "planned": "+".join(f"{value:.4f}" for value in planned.values()),
            "achieved": "+".join(f"{value:.4f}" for value in achieved.values()),
            "spare": f"{spare:.5f}",
            "unaligned": unaligned,
            "verdict": "met" if met else "missed",
            "plan_s": f"{seconds:.2f}",
        }


def widths_of(graph: prunus.CouplingGraph) -> dict[Axis, int]:
    """How wide the narrowest group on each axis of a contraction is, heads × dim as one."""
    found: dict[Axis, int] = {}
    for group in graph.groups:
        makers = [a for a, role in group.axes if role == "producer"] or [a for a, _ in group.axes]
        width = max(graph.shapes[axis.tensor][axis.dim] for axis in makers)
        for axis, role in group.axes:
            if role != "carrier":
                found[axis] = min(width, found.get(axis, width))
    return found


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def main() -> None:
    """Ask what was not asked at this commit, and replace its rows."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    options = parser.parse_args()
    done = options.table.done(by=commit())
    for name in options.models:
        rows = [{"model": name, **request, "commit": commit()} for request in requests()]
        rows = [row for row in rows if TABLE.key_of(row) not in done]
        subject = Subject(name) if rows else None
        for row in rows:
            assert subject is not None
            options.table.add(row | subject.ask(row))


if __name__ == "__main__":
    main()
