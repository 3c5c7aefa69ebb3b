"""Prune a trained network to half its MACs, end to end: ``python -m benchmarks.demo --out DIR``.

A residual network for Fashion-MNIST, trained beforehand, is pruned to 70, 50 and 35 % of its MACs
with the default recovery on 512 images without labels; no weight is trained.  Torch-Pruning does
the same beside it (l2 importance), and its model has its batch norms recalibrated on the same
images.  Prints a table of the models at half the MACs; writes plan.json, certificate.json,
report.json and demo.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
import prunus
from models_zoo import data

MODEL = "resnet_fmnist"
SHARES = (0.7, 0.5, 0.35)
HALF = 0.5
BATCHES = (1, 64)
COLOURS = {
    "Prunus": "#2a6fbb",
    "Torch-Pruning": "#d9822b",
    "Torch-Pruning, recalibrated": "#8a8a8a",
}


def calibration() -> Iterator[Tensor]:
    """Batches of images without labels; also for ``--data benchmarks/demo.py:calibration``."""
    return data.batches(data.calibration().images)


def measure(name: str, model: nn.Module) -> dict[str, Any]:
    """Accuracy on the test images, costs for one image, and latency in milliseconds."""
    images, labels = data.test()
    inputs = data.normalise(images[: max(BATCHES)])
    return {
        "name": name,
        "accuracy": data.accuracy(model, images, labels),
        **prunus.report.measure_costs(model, inputs[:1]),
        "latency_ms": {
            str(batch): prunus.report.measure_latency(model, inputs[:batch], warmup=5)
            for batch in BATCHES
        },
    }


def prune(share: float, seed: int) -> tuple[nn.Module, Any]:
    """Ours, at a share of the MACs.  What counts here is accuracy, so widths are not rounded."""
    model = models_zoo.build(MODEL, pretrained=True)
    small = prunus.shrink(
        model,
        models_zoo.example_inputs(MODEL),
        budget=prunus.Budget(macs=share),
        importance="obs",
        data=list(calibration()),
        round_to=1,
        seed=seed,
    )
    return model, small


def prune_with_torch_pruning(share: float) -> nn.Module:
    """Its largest model within as many MACs."""
    from benchmarks.peers import bounded

    model = models_zoo.build(MODEL, pretrained=True)
    (inputs,) = models_zoo.example_inputs(MODEL)
    limit = int(bounded.count_macs(model, inputs) * share)
    return bounded.torch_pruning(model, inputs, limit, criterion="l2", scope="local", batches=())


def run(out: Path, seed: int) -> dict[str, Any]:
    """Prune, measure after every step, and write the files; returns the report."""
    torch.manual_seed(seed)
    dense = measure("dense", models_zoo.build(MODEL, pretrained=True))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in COLOURS}
    halved: Any = None
    for share in SHARES:
        model, small = prune(share, seed)
        found["Prunus"].append(measure("Prunus", model))
        halved = small if share == HALF else halved
        if find_spec("torch_pruning") is not None:
            peer = prune_with_torch_pruning(share)
            found["Torch-Pruning"].append(measure("Torch-Pruning", peer))
            prunus.recovery.recalibrate(peer, calibration())
            name = "Torch-Pruning, recalibrated"
            found[name].append(measure(name, peer))

    out.mkdir(parents=True, exist_ok=True)
    halved.plan.save(out / "plan.json")
    draw(out / "demo.png", dense, found, halved.plan)
    at_half = SHARES.index(HALF)
    report = {
        "versions": {
            "prunus": prunus.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "seed": seed,
        "model": MODEL,
        "stages": [dense, *(rows[at_half] for rows in found.values() if rows)],
        "accuracy": {
            name: {str(share): row["accuracy"] for share, row in zip(SHARES, rows, strict=True)}
            for name, rows in found.items()
            if rows
        },
        "certificate": halved.certificate.to_json(),
    }
    for name, document in (("certificate", report["certificate"]), ("report", report)):
        text = json.dumps(document, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    return report


def draw(
    path: Path, dense: dict[str, Any], found: dict[str, list[dict[str, Any]]], plan: prunus.Plan
) -> None:
    """Accuracy against MACs for each engine, and the widths before and after at half the MACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in found.items():
        points = [(row["macs"] / dense["macs"], row["accuracy"]) for row in (dense, *rows)]
        if rows:
            left.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
    left.set(xlabel="share of the MACs", ylabel="test accuracy (%)", ylim=(0, 100))
    left.set_title("One-shot pruning, nothing trained", loc="left", fontsize=10)
    left.invert_xaxis()
    left.legend(frameon=False, loc="lower left", fontsize=8)
    groups = plan.groups
    names = [group.name.removesuffix(".weight[0]") for group in groups]
    right.barh(names, [g.size for g in groups], color="#dddddd", label="before")
    kept = [group.size - len(group.removed) for group in groups]
    right.barh(names, kept, color=COLOURS["Prunus"], label="after")
    right.invert_yaxis()
    right.set_xlabel("channels")
    right.set_title("Widths at half the MACs", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print its table; 0 if the pruned model was verified."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = run(options.out, options.seed)
    prunus.report.show_stages(report["stages"])
    verdict = report["certificate"]["verdict"]
    print(f"verified ({verdict}): the pruned model computes what the masked original computes.")
    print(f"Wrote {', '.join(sorted(f.name for f in options.out.iterdir()))} to {options.out}.")
    return 0 if verdict == "exact" else 1


if __name__ == "__main__":
    sys.exit(main())
