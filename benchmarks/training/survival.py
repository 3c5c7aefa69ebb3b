"""Whether pruned models of ultralytics stay pruned through what a user does with them.

Each model is built from its YAML with random weights, by the unmodified library, and trained on a
few small images that are made here.  One row a step:

* *shrink* to 60 % of the MACs;
* *train*, two epochs, interrupted after the first;
* *resume* from ``last.pt``; *val* of ``best.pt``;
* *save* and *reopen* in a new process that has no Prunus: the outputs are equal;
* *plain train* in that process: it stops with the sentence that names the trainer;
* *onnx*: outputs of ONNX Runtime against those of the module; *fuse*: likewise;
* *mid-run*: pruned while it trains, on a :class:`prunus.Schedule`, interrupted and resumed.

``params_before`` and ``params_after`` are those of the step, ``ema_distance`` the mean difference
of the weights and their average at the end of it, ``optimizer_live`` the share of the trainable
parameters that the optimizer holds, ``metric`` the difference of outputs relative to
the largest (of *shrink*, what another image changes), or the fitness.

Run with ``python -m benchmarks.training.survival [--only yolov8n …] [--steps mid-run …]``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prunus
from benchmarks.rows import Table

TABLE = Table(
    "training_survival.csv",
    ("framework", "model", "step", "params_before", "params_after", "ema_distance",
     "optimizer_live", "metric", "verdict"),
    key=("framework", "model", "step"),
)  # fmt: skip

MODELS = {
    "yolov8n": "DetectionTrainer",
    "yolo11n": "DetectionTrainer",
    "yolo11n-seg": "SegmentationTrainer",
    "yolo11n-pose": "PoseTrainer",
    "yolov8n-cls": "ClassificationTrainer",
    "rtdetr-l": "RTDETRTrainer",
}
SIZE = 64

CLOSE = 1e-4
"""Relative to the largest output."""

MOVES = 1e-2
"""By so much another image changes the outputs, or comparing them says nothing."""

FOLLOWS = 1e-3
"""An average over two epochs is nearer than this to weights that moved at these rates."""

Row = dict[str, Any]


class Interrupted(Exception):  # noqa: N818
    """Raised after the first epoch, as by a user's Ctrl-C."""


def write_data(root: Path, model: str) -> str:
    """Images with two boxes of two classes, and labels as the task has them."""
    pillow, noise = __import__("PIL.Image").Image, np.random.default_rng(0)
    boxes = ((0, 0.3, 0.35), (1, 0.65, 0.6))
    for split in ("train", "val"):
        for number in range(8):
            pixels = noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            folder = root / split / f"kind{number % 2}" if "cls" in model else root / split
            folder.mkdir(parents=True, exist_ok=True)
            pillow.fromarray(pixels).save(folder / f"{number}.png")
            lines = "".join(_label(model, *box) + "\n" for box in boxes)
            (folder / f"{number}.txt").write_text(lines)
    if "cls" in model:
        return str(root)
    shape = "kpt_shape: [17, 3]\n" if "pose" in model else ""
    text = f"path: {root}\ntrain: train\nval: val\n{shape}names: {{0: a, 1: b}}\n"
    (root / "data.yaml").write_text(text)
    return str(root / "data.yaml")


def _label(model: str, kind: int, x: float, y: float) -> str:
    if "seg" in model:
        corners = ((-0.2, -0.2), (0.2, -0.2), (0.2, 0.2), (-0.2, 0.2))
        return f"{kind} " + " ".join(f"{x + a:.2f} {y + b:.2f}" for a, b in corners)
    points = f" {x:.2f} {y:.2f} 2" * 17 if "pose" in model else ""
    return f"{kind} {x} {y} 0.4 0.4{points}"


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def outputs_of(answer: Any) -> torch.Tensor:
    """The decoded predictions, which come first."""
    while not isinstance(answer, torch.Tensor):
        answer = answer[0]
    return answer.detach()


def distance(one: Any, other: Any) -> float:
    """Relative to the largest output."""
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    return float((one - other).abs().max() / one.abs().max())


def wake(model: Any, x: torch.Tensor) -> None:
    """Let the outputs depend on the input: with its first weights, most of a net dies out."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms:
        torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        torch.nn.init.normal_(module.bias, std=0.2)
        module.train().momentum = None
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, *x.shape[1:]))
    for module in norms:
        module.eval().momentum = 0.03


class Run:
    """One model in a folder of its own, step by step."""

    def __init__(self, name: str, folder: Path) -> None:
        from prunus.integrations import ultralytics as bridge

        library = __import__("ultralytics")
        library.utils.LOGGER.setLevel(logging.ERROR)
        self.bridge, self.name, self.folder = bridge, name, folder
        self.open = library.RTDETR if "rtdetr" in name else library.YOLO
        self.data = write_data(folder / "data", name)
        self.trainer = getattr(bridge, MODELS[name])
        self.file = folder / "pruned.pt"
        self.x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.live: Row = {}

    def shrink(self) -> Row:
        torch.manual_seed(0)
        yolo = self.open(f"{self.name}.yaml")
        before = count(yolo.model)
        wake(yolo.model.eval(), self.x)
        small = prunus.shrink(yolo.model, self.x, budget=prunus.Budget(macs=0.6), each_group=False)
        self.bridge.save(yolo, self.file)
        self.answer = outputs_of(yolo.model.eval()(self.x))
        moved = distance(self.answer, outputs_of(yolo.model(1 - self.x)))
        verdict = small.certificate.verdict if small.certificate else "not verified"
        verdict = verdict if moved > MOVES else "the outputs don't depend on the input"
        return self._row(before, count(yolo.model), verdict, metric=moved)

    def train(self) -> Row:
        yolo = self.open(self.file)
        before = count(yolo.model)
        return self._interrupted(yolo, before)

    def resume(self) -> Row:
        return self._resumed(count(self.open(self._last).model))

    def val(self) -> Row:
        yolo = self.open(self._last.with_name("best.pt"))
        before = count(yolo.model)
        found = yolo.val(data=self.data, imgsz=SIZE, plots=False, project=str(self.folder))
        row = self._row(before, before, "ok", metric=float(found.fitness))
        row["verdict"] = "ok" if np.isfinite(found.fitness) else "no metric"
        return row

    def reopen(self) -> Row:
        torch.save((self.x, self.answer), self.folder / "answer.pt")
        said = self._without_prunus(_REOPEN)
        return self._row(
            count(self.open(self.file).model), said["params"],
            "ok" if said["off"] <= CLOSE else "differs", metric=said["off"],
        )  # fmt: skip

    def plain_train(self) -> Row:
        said = self._without_prunus(_PLAIN)
        before = count(self.open(self.file).model)
        stopped = f"ultralytics.{MODELS[self.name]}" in said["error"]
        return self._row(before, before, "ok" if stopped else f"went on: {said['error']}")

    def onnx(self) -> Row:
        import onnxruntime

        yolo = self.open(self.file)
        before = count(yolo.model)
        path = yolo.export(format="onnx", imgsz=SIZE, simplify=False)
        session = onnxruntime.InferenceSession(path)
        answer = session.run(None, {session.get_inputs()[0].name: self.x.numpy()})[0]
        off = distance(self.answer, answer)
        return self._row(before, before, "ok" if off <= CLOSE else "differs", metric=off)

    def fuse(self) -> Row:
        yolo = self.open(self.file)
        before = count(yolo.model)
        yolo.fuse()
        off = distance(self.answer, outputs_of(yolo.model(self.x)))
        after = count(yolo.model)
        fine = off <= CLOSE and after <= before
        return self._row(before, after, "ok" if fine else "differs", metric=off)

    def mid_run(self) -> Row:
        yolo = self.open(f"{self.name}.yaml")
        row = self._interrupted(yolo, count(yolo.model), pruning=self._pruning())
        before, half = self.began, row["params_after"]  # the dense one, with the data's classes
        if row["verdict"] != "ok" or half >= before:
            return row | {"verdict": f"not pruned in the first epoch ({row['verdict']})"}
        row = self._resumed(half, pruning=self._pruning())
        shrank = row["params_after"] < half
        return row | {
            "params_before": before,
            "verdict": row["verdict"] if shrank else "not pruned after the resume",
        }

    def _pruning(self) -> Any:
        return self.bridge.Pruning(budget=prunus.Budget(macs=0.6), steps=2, verified=False)

    def _train(self, yolo: Any, interrupt: bool, pruning: Any, **options: Any) -> None:
        self.live = {}
        yolo.add_callback("on_train_start", self._begin)
        yolo.add_callback("on_train_batch_end", self._look)
        if pruning is not None:
            pruning.attach(yolo)
        if interrupt:
            yolo.add_callback("on_fit_epoch_end", _interrupt)
        yolo.train(trainer=self.trainer, plots=False, **options)

    def _interrupted(self, yolo: Any, before: int, pruning: Any = None) -> Row:
        options = {"data": self.data, "epochs": 2, "imgsz": SIZE, "batch": 4, "amp": False}
        options |= {"project": str(self.folder / "runs"), "name": "a" if pruning is None else "b"}
        options |= {"exist_ok": True, "optimizer": "AdamW", "nbs": 4}
        try:
            self._train(yolo, True, pruning, **options)
        except Interrupted:
            self._last = Path(options["project"], options["name"], "weights", "last.pt")
            return self._after(before, count(self.open(self._last).model))
        return self._row(before, before, "was not interrupted")

    def _resumed(self, before: int, pruning: Any = None) -> Row:
        yolo = self.open(self._last)
        self._train(yolo, False, pruning, resume=True)
        return self._after(before, count(yolo.model))

    def _after(self, before: int, after: int) -> Row:
        fine = (
            after <= before and self.live["optimizer_live"] == 1
            and self.live["ema_distance"] < FOLLOWS
        )  # fmt: skip
        verdict = "ok" if fine else "grew" if after > before else "does not follow"
        return self._row(before, after, verdict) | self.live

    def _begin(self, trainer: Any) -> None:
        self.began = count(trainer.model)

    def _look(self, trainer: Any) -> None:
        """Model, average and optimizer, at the end of a batch."""
        model, average = trainer.model.state_dict(), trainer.ema.ema.state_dict()
        far = [(model[n] - average[n]).abs().mean() for n in model if "weight" in n]
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        wanted = [p for p in trainer.model.parameters() if p.requires_grad]
        self.live = {
            "ema_distance": float(f"{torch.stack(far).mean():.2e}"),
            "optimizer_live": sum(id(p) in held for p in wanted) / len(wanted),
        }

    def _row(self, before: int, after: int, verdict: str, **more: Any) -> Row:
        if "metric" in more:
            more["metric"] = f"{more['metric']:.3g}"
        return {"params_before": before, "params_after": after, "verdict": verdict} | more

    def _without_prunus(self, code: str) -> Row:
        """What a new process says that can't import Prunus."""
        head = "import sys; sys.modules['prunus'] = None\n"
        ran = subprocess.run(
            [sys.executable, "-c", head + code, self.data],
            cwd=self.folder, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        lines = [line[2:] for line in ran.stdout.splitlines() if line.startswith("@ ")]
        if not lines:
            raise RuntimeError(ran.stderr[-500:])
        return json.loads(lines[-1])  # type: ignore[no-any-return]


_REOPEN = """
import json, torch
from ultralytics import YOLO
x, wanted = torch.load("answer.pt", weights_only=True)
model = YOLO("pruned.pt").model
answer = model(x)
while not isinstance(answer, torch.Tensor):
    answer = answer[0]
off = float((answer - wanted).abs().max() / wanted.abs().max())
print("@", json.dumps({"off": off, "params": sum(p.numel() for p in model.parameters())}))
"""

_PLAIN = """
import json, os
from ultralytics import YOLO
error = ""
try:
    YOLO("pruned.pt").train(data=sys.argv[1], epochs=1, imgsz=64, project=os.path.abspath("plain"))
except Exception as raised:
    error = str(raised)
print("@", json.dumps({"error": error}))
"""


def _interrupt(trainer: Any) -> None:
    raise Interrupted


STEPS: dict[str, Callable[[Run], Row]] = {
    "shrink": Run.shrink,
    "train": Run.train,
    "resume": Run.resume,
    "val": Run.val,
    "reopen": Run.reopen,
    "plain train": Run.plain_train,
    "onnx": Run.onnx,
    "fuse": Run.fuse,
    "mid-run": Run.mid_run,
}


def main() -> None:
    parser = TABLE.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(name, Path(folder))
            for step in options.steps:
                try:
                    row = STEPS[step](run)
                except Exception as error:  # a row says so, and the next step is tried
                    row = {"verdict": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                options.table.add({"framework": "ultralytics", "model": name, "step": step} | row)


if __name__ == "__main__":
    main()
