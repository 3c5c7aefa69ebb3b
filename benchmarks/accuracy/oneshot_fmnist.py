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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models_zoo
import prunus
from benchmarks.accuracy import oneshot_grid
from benchmarks.peers import bounded
from benchmarks.peers.judge import OutOfTime
from benchmarks.rows import MissingError, Table, commit
from models_zoo import data

VARIABLE = "FASHION_MNIST"
MODEL = "resnet_fmnist"
LEVELS = (0.7, 0.5, 0.35, 0.25)
SEEDS = range(5)
IMAGES, BATCH = 512, 128
BEST = 4
"""How many settings of a peer run with all seeds, at every level."""

LIMIT = 600
SCOPE = "local"
TABLE = Table(
    "oneshot_fmnist.csv",
    (
        "engine", "importance", "scope", "recovery", "seed", "level", "macs_ratio", "accuracy",
        "dense_accuracy", "images", "note", "commit",
    ),
    ("engine", "importance", "scope", "recovery", "seed", "level"),
)  # fmt: skip


class Study:
    """The dense network, its accuracy, and the images of both sets."""

    def __init__(self, folder: Path, table: Table = TABLE) -> None:
        if not folder.is_dir():
            raise MissingError(f"Fashion-MNIST in the folder {folder}")
        self._table, self._done = table, table.done()
        train, self.test = data.load_full(folder)
        seen = {image.tobytes() for image in self.test.images}
        # Some images of the training set are in the test set as well.
        self.pool = np.array([n for n, image in enumerate(train.images)
                              if image.tobytes() not in seen])  # fmt: skip
        self.train = train
        self.model = models_zoo.build(MODEL, pretrained=True)
        self.inputs = models_zoo.example_inputs(MODEL)[0]
        self.macs = bounded.count_macs(self.model, self.inputs)
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
            "macs_ratio": f"{bounded.count_macs(model, self.inputs) / self.macs:.4f}",
            "accuracy": f"{self.accuracy(model):.2f}",
            "dense_accuracy": f"{self.dense:.2f}",
            "images": len(self.test.images),
            "commit": commit(),
        }

    def missing(self, **known: Any) -> bool:
        """Whether the table had no row for this at the start."""
        return self._table.key_of(known) not in self._done


def ours(study: Study, seed: int, importances: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every recovery at every level."""
    cells = [
        {"engine": "prunus", "importance": importance, "scope": SCOPE, "recovery": recovery,
         "seed": seed, "level": level}
        for importance in importances
        for level in LEVELS
        for recovery in oneshot_grid.RECOVERIES
    ]  # fmt: skip

    def calibrate() -> oneshot_grid.Calibrated:
        batches = study.draw(seed)
        seen = prunus.importance.collect(
            study.model, study.graph, batches, oneshot_grid.NEEDS, seed=seed
        )
        return oneshot_grid.Calibrated(study.model, study.graph, batches, seen)

    cells = [cell for cell in cells if study.missing(**cell)]
    for cell, model in oneshot_grid.fill(cells, calibrate, seed=seed):
        yield study.row(model, **cell)


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
            model = bounded.torch_pruning(study.model, study.inputs, limit, **options)
            if "cut" in recoveries:
                yield study.row(model, recovery="cut", **known)
            prunus.recovery.recalibrate(model, batches)
            yield study.row(model, recovery="recalibrated", **known)


def settings(level: float, seed: int) -> list[tuple[str, str]]:
    """Criteria and scopes of Torch-Pruning that run with a seed."""
    if seed == 0:
        return [(c, s) for c in bounded.CRITERIA for s in bounded.SCOPES]
    first = [
        row for row in TABLE.read()
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
            model = bounded.torch_kirigami(study.model, study.inputs, limit, seconds=max(1, left))
        except OutOfTime:
            note = f"did not finish in {LIMIT // 60} minutes of processor time"
            yield {**known, "recovery": "recalibrated", "note": note, "commit": commit(),
                   "dense_accuracy": f"{study.dense:.2f}"}  # fmt: skip
            continue
        yield study.row(model, recovery="cut", **known)
        prunus.recovery.recalibrate(model, study.draw(seed))
        yield study.row(model, recovery="recalibrated", **known)


def ask_for_data(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the option for the folder of the images."""
    folder = os.environ.get(VARIABLE, "/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=Path(folder), metavar="FOLDER")
    return parser


def main() -> None:
    """Measure what is missing, one row after the other, and print the table."""
    parser = ask_for_data(TABLE.parser(__doc__))
    parser.add_argument("--engine", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--importance", nargs="*", default=oneshot_grid.IMPORTANCES)
    parser.add_argument("--seed", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--table", dest="show", action="store_true", help="only print the table")
    options = parser.parse_args()
    study = None if options.show else Study(options.data, options.table)
    for seed in options.seed if study else ():
        for engine in options.engine:
            own = (options.importance,) if engine == "prunus" else ()
            for row in ENGINES[engine](study, seed, *own):
                options.table.add(row)
    columns = ("engine", "importance", "scope", "recovery")
    print(options.table.pivot(columns, "level", "accuracy"))


ENGINES: dict[str, Any] = {
    "prunus": ours,
    "torch-pruning": torch_pruning,
    "torch-kirigami": torch_kirigami,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
