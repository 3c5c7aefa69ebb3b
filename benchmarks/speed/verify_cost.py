"""What verification costs, in plain forwards: ``benchmarks/results/verify_cost.csv``.

``python -m benchmarks.speed.verify_cost [MODEL...]`` runs everything in one process on one
thread, at batch 1.  Weights are random; CPU seconds, the least of three runs, and of one for
``shrink``, which changes its model.

Columns: model, forward_s (one plain forward, no gradients), trace_s (one ``prunus.trace``),
verify_s and shrink_s (with all they do, the traces inside left out, which ``*_traces_s`` have),
verify_forwards and shrink_forwards (these over forward_s).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import prunus
from benchmarks.rows import Table

TABLE = Table(
    "verify_cost.csv",
    (
        "model", "forward_s", "trace_s", "verify_s", "verify_traces_s", "verify_forwards",
        "shrink_s", "shrink_traces_s", "shrink_forwards", "verdict", "shrunk",
    ),
    ("model",),
)  # fmt: skip
RUNS = 2


def _timm(name: str) -> Callable[[], tuple[nn.Module, Any, Any]]:
    def build() -> tuple[nn.Module, Any, Any]:
        import timm

        return timm.create_model(name), torch.randn(1, 3, 224, 224), None

    return build


def _bert() -> tuple[nn.Module, Any, Any]:
    from transformers import BertConfig, BertModel

    ids = torch.randint(0, 30522, (1, 128))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return BertModel(BertConfig()), (), kwargs


def _yolo() -> tuple[nn.Module, Any, Any]:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False), torch.randn(1, 3, 640, 640), None


MODELS = {
    "resnet50": _timm("resnet50"),
    "mobilenetv2": _timm("mobilenetv2_100"),
    "hrnet_w18": _timm("hrnet_w18"),
    "vit_small": _timm("vit_small_patch16_224"),
    "bert_base": _bert,
    "yolov8n": _yolo,
}


class Traces:
    """Seconds that traces take inside other calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watched(self) -> Iterator[Traces]:
        task: Any = importlib.import_module("prunus.tracer.trace")._Task
        right = task.graph

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return right(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        task.graph = timed
        try:
            yield self
        finally:
            task.graph = right


def clock(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of a call without the traces inside, of these, and what it returned."""
    with Traces().watched() as traces:
        started = time.process_time()
        found = call()
        total = time.process_time() - started
    return total - traces.seconds, traces.seconds, found


def least(call: Callable[[], Any], runs: int = RUNS) -> tuple[float, float, Any]:
    return min((clock(call) for _ in range(runs)), key=lambda run: run[0])


def measure(name: str) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    model.eval()
    positional = (args,) if isinstance(args, torch.Tensor) else args

    def forward() -> Any:
        with torch.no_grad():
            return model(*positional, **(kwargs or {}))

    forward()
    forward_s, _, _ = least(forward, 5)
    trace_s, graph_s, graph = clock(lambda: prunus.trace(model, args, kwargs))
    budget = prunus.Budget(macs=0.5)
    plan = prunus.plan(graph, model, budget=budget)
    verify_s, verify_traces, certificate = least(lambda: prunus.verify(plan, model, args, kwargs))
    shrink_s, shrink_traces, small = clock(
        lambda: prunus.shrink(model, args, kwargs, budget=budget)
    )
    return {
        "model": name,
        "forward_s": f"{forward_s:.4f}",
        "trace_s": f"{trace_s + graph_s:.3f}",
        "verify_s": f"{verify_s:.3f}",
        "verify_traces_s": f"{verify_traces:.3f}",
        "verify_forwards": f"{verify_s / forward_s:.1f}",
        "shrink_s": f"{shrink_s:.3f}",
        "shrink_traces_s": f"{shrink_traces:.3f}",
        "shrink_forwards": f"{shrink_s / forward_s:.1f}",
        "verdict": certificate.verdict,
        "shrunk": small.certificate.verdict,
    }


def main() -> None:
    """Measure the models asked for."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("prunus.api")  # what is imported once is no part of a call
    for name in options.models:
        options.table.add(measure(name))


if __name__ == "__main__":
    main()
