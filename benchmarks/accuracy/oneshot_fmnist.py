"""A residual network cut once, nothing trained, no labels; ``results/oneshot_fmnist.csv``.

    python -m benchmarks.accuracy.oneshot_fmnist --data FOLDER  # what is missing; an hour or two
    python -m benchmarks.accuracy.oneshot_fmnist --engine prunus --importance obs --seed 0
    python -m benchmarks.accuracy.oneshot_fmnist --table  # print the table that there is

FOLDER (or the variable ``FASHION_MNIST``) holds the four files of Fashion-MNIST; Debian's package
``dataset-fashion-mnist`` has them in ``/usr/share/datasets/fashion-mnist``.

The zoo's ``resnet_fmnist`` keeps at most 70, 50, 35 and 25 % of its MACs.  512 images of the
training set calibrate, a draw for every seed (which also seeds random scores); accuracy is that on
all 10,000 test images.  The run refuses calibration images that are test images, by hash.

Torch-Pruning gets its own criteria in its three scopes and the same calibration of batch norms.
All settings run with seed 0, and the four best of every level, chosen by their accuracy on the test
set in its favour, with the other seeds.  torch-kirigami has one seed and ten minutes of processor
time for all levels.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models_zoo
import prunus
from benchmarks import rows
from benchmarks.accuracy import oneshot_grid, oneshot_peers
from benchmarks.peers import peers
from models_zoo import data

RESULTS = Path(__file__).parents[1] / "results" / "oneshot_fmnist.csv"
VARIABLE = "FASHION_MNIST"
MODEL = "resnet_fmnist"
LEVELS = (0.7, 0.5, 0.35, 0.25)
SEEDS = range(5)
IMAGES, BATCH = 512, 128
BEST = 4
"""How many settings of a peer run with all seeds, at every level."""

LIMIT = 600
SCOPE = "local"
FIELDS = (
    "engine", "importance", "scope", "recovery", "seed", "level", "macs_ratio", "accuracy",
    "dense_accuracy", "images", "note", "commit",
)  # fmt: skip
KEY = ("engine", "importance", "scope", "recovery", "seed", "level")


class Study:
    """The dense network, its accuracy, and the images of both sets."""

    def __init__(self, folder: Path) -> None:
        train, self.test = data.load_full(folder)
        seen = {image.tobytes() for image in self.test.images}
        # Some images of the training set are in the test set as well.
        self.pool = np.array([n for n, image in enumerate(train.images)
                              if image.tobytes() not in seen])  # fmt: skip
        self.train = train
        self.model = models_zoo.build(MODEL, pretrained=True)
        self.inputs = models_zoo.example_inputs(MODEL)[0]
        self.macs = oneshot_peers.count_macs(self.model, self.inputs)
        self.dense = self.accuracy(self.model)
        self.graph = prunus.trace(self.model, self.inputs)

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test images, in the memory format in which convolutions are fastest."""
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return data.accuracy(twin, *self.test, batch_size=100)

    def draw(self, seed: int) -> list[Tensor]:
        """Calibration batches of a seed; refused if a test image is among them."""
        chosen = np.random.default_rng(seed).choice(self.pool, IMAGES, replace=False)
        images = self.train.images[np.sort(chosen)]
        oneshot_grid.check_disjoint(
            (image.tobytes() for image in images), (image.tobytes() for image in self.test.images)
        )
        return list(data.batches(images, batch_size=BATCH))

    def row(self, model: nn.Module, **known: Any) -> dict[str, Any]:
        """A row of the table for a smaller model."""
        return known | {
            "macs_ratio": f"{oneshot_peers.count_macs(model, self.inputs) / self.macs:.4f}",
            "accuracy": f"{self.accuracy(model):.2f}",
            "dense_accuracy": f"{self.dense:.2f}",
            "images": len(self.test.images),
            "commit": rows.commit(),
        }

    @cached_property
    def done(self) -> set[tuple[str, ...]]:
        """The keys of the rows that there are."""
        return {tuple(row[name] for name in KEY) for row in rows.read(RESULTS)}

    def missing(self, **known: Any) -> bool:
        """Whether the table has no row for this yet."""
        return tuple(str(known[name]) for name in KEY) not in self.done


def ours(study: Study, seed: int, importances: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every recovery at every level; a draw is looked at once for all of them."""
    cells = [
        {"engine": "prunus", "importance": importance, "scope": SCOPE, "recovery": recovery,
         "seed": seed, "level": level}
        for importance in importances
        for level in LEVELS
        for recovery in oneshot_grid.RECOVERIES
    ]  # fmt: skip
    cells = [cell for cell in cells if study.missing(**cell)]
    if not cells:
        return
    batches = study.draw(seed)
    seen = prunus.importance.collect(
        study.model, study.graph, batches, oneshot_grid.NEEDS, seed=seed
    )
    dense = oneshot_grid.Calibrated(study.model, study.graph, batches, seen)
    plans: dict[tuple[str, float], prunus.Plan] = {}
    for cell in cells:
        chosen = cell["importance"], cell["level"]
        if chosen not in plans:
            budget = prunus.Budget(macs=cell["level"])
            options: Any = {"budget": budget, "scope": SCOPE, "seed": seed, "round_to": 1}
            plans[chosen] = dense.plan(chosen[0], **options)
        yield study.row(oneshot_grid.RECOVERIES[cell["recovery"]](dense, plans[chosen]), **cell)


def torch_pruning(study: Study, seed: int) -> Iterator[dict[str, Any]]:
    """All settings for seed 0, the best ones for the others."""
    batches: list[Tensor] | None = None
    for level in LEVELS:
        for criterion, scope in settings(level, seed):
            known = {"engine": "torch-pruning", "importance": criterion, "scope": scope,
                     "seed": seed, "level": level}  # fmt: skip
            recoveries = ("cut", "recalibrated") if seed == 0 else ("recalibrated",)
            if not any(study.missing(recovery=r, **known) for r in recoveries):
                continue
            batches = batches or study.draw(seed)
            limit = int(level * study.macs)
            options: dict[str, Any] = {"criterion": criterion, "scope": scope, "batches": batches}
            model = oneshot_peers.torch_pruning(study.model, study.inputs, limit, **options)
            if "cut" in recoveries:
                yield study.row(model, recovery="cut", **known)
            prunus.recovery.recalibrate(model, batches)
            yield study.row(model, recovery="recalibrated", **known)


def settings(level: float, seed: int) -> list[tuple[str, str]]:
    """Criteria and scopes of Torch-Pruning that run with a seed."""
    if seed == 0:
        return [(c, s) for c in oneshot_peers.CRITERIA for s in oneshot_peers.SCOPES]
    first = [
        row for row in rows.read(RESULTS)
        if row["engine"] == "torch-pruning" and row["recovery"] == "recalibrated"
        and row["seed"] == "0" and float(row["level"]) == level
    ]  # fmt: skip
    first.sort(key=lambda row: -float(row["accuracy"]))
    return [(row["importance"], row["scope"]) for row in first[:BEST]]


def torch_kirigami(study: Study, seed: int) -> Iterator[dict[str, Any]]:
    """One seed, and ten minutes for all levels."""
    started = time.process_time()
    for level in LEVELS if seed == 0 else ():
        known = {"engine": "torch-kirigami", "importance": "l2", "scope": "greedy", "seed": seed,
                 "level": level}  # fmt: skip
        if not study.missing(recovery="recalibrated", **known):
            continue
        left = LIMIT - int(time.process_time() - started)
        limit = int(level * study.macs)
        try:
            model = oneshot_peers.torch_kirigami(
                study.model, study.inputs, limit, seconds=max(1, left)
            )
        except peers.OutOfTime:
            note = f"did not finish in {LIMIT // 60} minutes of processor time"
            yield {**known, "recovery": "recalibrated", "note": note, "commit": rows.commit(),
                   "dense_accuracy": f"{study.dense:.2f}"}  # fmt: skip
            continue
        yield study.row(model, recovery="cut", **known)
        prunus.recovery.recalibrate(model, study.draw(seed))
        yield study.row(model, recovery="recalibrated", **known)


def table(found: Sequence[rows.Row]) -> Iterator[str]:
    """Mean, and spread over the seeds, by setting and level; the best setting of a peer."""
    yield f"{'':52}" + "".join(f"{level:>14}" for level in LEVELS)
    settings = dict.fromkeys(
        (r["engine"], r["importance"], r["scope"], r["recovery"]) for r in found if r["accuracy"]
    )
    for engine, *rest in settings:
        cells = [figures(found, level, engine, *rest) for level in LEVELS]
        told = [f"{m:6.2f} ± {s:4.2f}" if m else "" for m, s in cells]
        yield f"{' '.join((engine, *rest)):52}" + "".join(f"{text:>14}" for text in told)


def figures(
    found: Sequence[rows.Row], level: float, engine: str, importance: str, scope: str, recovery: str
) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over the seeds; zeros where there is none."""
    setting = (engine, importance, scope, recovery)
    values = [
        float(row["accuracy"])
        for row in found
        if (row["engine"], row["importance"], row["scope"], row["recovery"]) == setting
        and float(row["level"]) == level
        and row["accuracy"]
    ]
    spread = stdev(values) if len(values) > 1 else 0.0
    return (mean(values), spread) if values else (0.0, 0.0)


def ask(text: str, draws: int) -> tuple[Study, range]:
    """Read the command line of another benchmark on this network: the study, and the draws."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=draws)
    options = parser.parse_args()
    return Study(options.data), range(options.seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, one row after the other, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = os.environ.get(VARIABLE, "/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=Path(folder), metavar="FOLDER")
    parser.add_argument(
        "--engine", nargs="*", choices=ENGINES, default=list(ENGINES), metavar="NAME"
    )
    parser.add_argument("--importance", nargs="*", default=oneshot_grid.IMPORTANCES)
    parser.add_argument("--seed", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(arguments)
    if not options.table:
        study = Study(options.data)
        for seed in options.seed:
            for engine in options.engine:
                measured = (
                    ours(study, seed, options.importance)
                    if engine == "prunus"
                    else ENGINES[engine](study, seed)
                )
                for row in measured:
                    rows.replace(RESULTS, FIELDS, KEY, [row])
                    print(" ".join(str(row.get(name, "")) for name in FIELDS), flush=True)
    print("\n".join(table(rows.read(RESULTS))))
    return 0


ENGINES: dict[str, Any] = {
    "prunus": ours,
    "torch-pruning": torch_pruning,
    "torch-kirigami": torch_kirigami,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
