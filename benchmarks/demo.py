"""Prune a trained network to half its MACs, end to end: ``python benchmarks/demo.py --out DIR``.

A residual network for Fashion-MNIST, trained beforehand, is traced, cut under a budget, proven to
compute what the masked original computes, and its batch norms are measured again on 512 images
without labels.  No weight is trained.  Prints one table; writes plan.json, certificate.json,
channels.png and report.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
import prunus
from models_zoo import data

MODEL = "resnet_fmnist"
BUDGET = {"macs": 0.5}

# Chosen by accuracy after recalibration on the 512 labelled calibration images: the best of l1 and
# l2, of the scopes, and of which of the three residual streams to leave alone.  The global scope is
# far behind here: it cuts the stem, where MACs are cheapest to save, down to a channel.
IMPORTANCE, SCOPE = "l2", "local"
EXCLUDE = "layer2.0.conv2.weight[0]"  # the residual stream of the second stage stays whole

BATCHES = (1, 64)


def calibration() -> Iterator[Tensor]:
    """Batches of images for the batch norms; also for ``--data benchmarks/demo.py:calibration``."""
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


def run(out: Path, seed: int) -> dict[str, Any]:
    """Prune, measure after every step, and write the files; returns the report."""
    torch.manual_seed(seed)
    inputs = models_zoo.example_inputs(MODEL)
    model = models_zoo.build(MODEL, pretrained=True)
    stages = [measure("dense", model)]

    graph = prunus.trace(model, inputs)
    budget = prunus.Budget(**BUDGET)
    plan = prunus.plan(
        *(graph, model),
        budget=budget,
        importance=IMPORTANCE,
        scope=SCOPE,
        exclude=EXCLUDE,
        round_to=1,  # what counts here is accuracy at half the MACs, not speed
        seed=seed,
    )
    certificate = prunus.verify(plan, model, inputs, seed=seed)
    prunus.apply(plan, model)
    stages.append(measure("cut", model))

    prunus.recovery.recalibrate(model, calibration())
    stages.append(measure("recalibrated", model))

    out.mkdir(parents=True, exist_ok=True)
    plan.save(out / "plan.json")
    prunus.report.draw_channels(
        plan, out / "channels.png", title=f"{MODEL}: the channels that stay at half the MACs"
    )
    report = {
        "command": ["benchmarks/demo.py", *sys.argv[1:]],
        "versions": {
            "prunus": prunus.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "seed": seed,
        "model": MODEL,
        "budget": BUDGET,
        "importance": IMPORTANCE,
        "scope": SCOPE,
        "exclude": EXCLUDE,
        "stages": stages,
        "certificate": certificate.to_json(),
    }
    for name, document in (("certificate", report["certificate"]), ("report", report)):
        text = json.dumps(document, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print its table; 0 if the cut was proven."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    report = run(options.out, options.seed)
    prunus.report.show_stages(report["stages"])
    verdict = report["certificate"]["verdict"]
    print(f"The cut model computes what the masked original computes: {verdict}.")
    print(
        f"Wrote {', '.join(sorted(file.name for file in options.out.iterdir()))} to {options.out}."
    )
    return 0 if verdict == "exact" else 1


if __name__ == "__main__":
    sys.exit(main())
