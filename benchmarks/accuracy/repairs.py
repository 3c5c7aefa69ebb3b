"""What the repairs beside least squares are worth; ``results/repairs.csv``.

    python -m benchmarks.accuracy.repairs --data FOLDER  # a quarter of an hour

* *resnet_fmnist*: the zoo's network on Fashion-MNIST, cut to 70, 50, 35 and 25 % of its MACs, every
  group by the same ratio: as ``l2`` leaves it, with batch norms refreshed by random inputs, and
  measured again on images; and by ``obs``, repaired at once (*auto*: least squares, batch norms)
  and layer after layer (*sequential*).  ``value`` is accuracy on all test images in per cent,
  ``dense_value`` the dense one's; a seed is a draw of 512 calibration images, and of the random
  inputs.
* *vit_tiny*: timm's, untrained, without half of the dims of every head, cut and repaired by least
  squares with heads turned first: ``value`` is √(Σ (y − y₀)² / Σ y₀²) of the outputs on 64 random
  images, calibrated on 512 others.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from benchmarks.accuracy.oneshot_fmnist import Study, ask_for_data
from benchmarks.rows import Table, commit

TABLE = Table(
    "repairs.csv",
    (
        "model", "importance", "repair", "level", "seed", "macs_ratio", "value", "dense_value",
        "seconds", "commit",
    ),
    ("model", "importance", "repair", "level", "seed"),
)  # fmt: skip
LEVELS = (0.7, 0.5, 0.35, 0.25)
SEEDS, IMAGES = 3, 512
REPAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("l2", "cut"): {"recover": "none"},
    ("l2", "batch norms without data"): {"recover": "auto"},
    ("l2", "recalibrated"): {"recover": "recalibrate", "data": True},
    ("obs", "auto"): {"recover": "auto", "data": True},
    ("obs", "sequential"): {"recover": "sequential", "data": True},
}


@torch.no_grad()
def off(dense: nn.Module, smaller: nn.Module, batches: list[Tensor]) -> float:
    """√(Σ (y − y₀)² / Σ y₀²)."""
    wanted, found = (torch.cat([model(x) for x in batches]) for model in (dense, smaller))
    return math.sqrt(float((found - wanted).square().sum() / wanted.square().sum()))


def fashion(study: Study, seed: int) -> Iterator[dict[str, Any]]:
    """Every repair at every level, of one draw."""
    batches = study.draw(seed)
    for level in LEVELS:
        for (importance, repair), chosen in REPAIRS.items():
            model = copy.deepcopy(study.model)
            budget = prunus.Budget(macs=level)
            options: dict[str, Any] = {"budget": budget, "round_to": 1, "seed": seed}
            if importance == "obs":
                seen = prunus.importance.collect(study.model, study.graph, batches, "second_moment")
                options["statistics"] = seen
            data = batches if chosen.get("data") else None
            started = time.perf_counter()
            prunus.shrink(
                model, study.inputs, importance=importance, recover=chosen["recover"],
                verified=False, data=data, **options,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            found = study.row(model, importance=importance, repair=repair, level=level, seed=seed)
            yield {
                **found,
                "model": "resnet_fmnist",
                "value": found["accuracy"],
                "dense_value": found["dense_accuracy"],
                "seconds": f"{seconds:.1f}",
            }


def heads() -> Iterator[dict[str, Any]]:
    """What is left of the error when heads lose half of their dims."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)  # else attention is even
    images, others = torch.randn(IMAGES + 64, 3, 64, 64).split([IMAGES, 64])
    graph = prunus.trace(model, images[:1])
    dims = [group.name for group in graph.groups if group.name.endswith("qkv.weight[0]/2")]
    hold = [group.name for group in graph.groups if group.name not in dims]
    plan = prunus.plan(graph, model, ratio=0.5, hold=hold)
    repairs: dict[str, Callable[[nn.Module], Any]] = {
        "cut": lambda m: prunus.apply(plan, m),
        "least squares": lambda m: prunus.recovery.compensate(m, plan, graph, images.split(64)),
    }
    for repair, make in repairs.items():
        smaller = copy.deepcopy(model)
        started = time.perf_counter()
        make(smaller)
        seconds = time.perf_counter() - started
        yield {
            "model": "vit_tiny", "importance": "l2", "repair": repair, "level": "half of dims",
            "seed": 0, "value": f"{off(model, smaller, [others]):.4f}",
            "macs_ratio": f"{plan.cost('macs').share:.4f}", "dense_value": 0,
            "seconds": f"{seconds:.1f}", "commit": commit(),
        }  # fmt: skip


def main() -> None:
    """Measure, and replace the rows."""
    parser = ask_for_data(TABLE.parser(__doc__))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="draws of calibration images")
    options = parser.parse_args()
    study = Study(options.data)
    for row in chain(heads(), *(fashion(study, seed) for seed in range(options.seeds))):
        options.table.add(row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
