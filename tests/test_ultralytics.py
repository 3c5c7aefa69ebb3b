"""Pruned models of ultralytics: the file that ``YOLO()`` opens, and training that keeps widths."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import prunus
from prunus.cli import main
from prunus.errors import DataError, ModelError, PlanError
from tests.boxes import NAMES, write_boxes

ultralytics = pytest.importorskip("ultralytics")
from prunus.integrations import ultralytics as bridge  # noqa: E402


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = ultralytics.YOLO("yolov8n.yaml").model
    graph = prunus.trace(model, torch.rand(1, 3, 64, 64))
    prunus.apply(prunus.plan(graph, model, budget=prunus.Budget(macs=0.6)), model)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("boxes") / "boxes")


OPENS = """
import os, sys, torch
from ultralytics import YOLO
torch.manual_seed(0)
yolo = YOLO("pruned.pt")
print("@", yolo.model.double()(torch.rand(1, 3, 64, 64, dtype=torch.float64))[0].abs().sum().item())
try:
    YOLO("pruned.pt").train(data=sys.argv[1], epochs=1, imgsz=32, project=os.path.abspath("runs"))
except KeyError as error:
    print("@", error)
print("@", "prunus" in sys.modules)
"""


def test_yolo_opens_the_file_without_prunus_and_does_not_rebuild_it(
    pruned: nn.Module, data: Path, tmp_path: Path
) -> None:
    bridge.save(pruned, tmp_path / "pruned.pt")
    assert os.listdir(tmp_path) == ["pruned.pt"]
    paths = os.environ | {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    block = "import sys; sys.modules['prunus'] = None\n"
    code = (block + OPENS).replace('"prunus" in sys.modules', 'sys.modules["prunus"]')
    ran = subprocess.run(
        [sys.executable, "-c", code, str(data)],
        cwd=tmp_path, env=paths, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    total, sentence, missing = (
        line[2:] for line in ran.stdout.splitlines() if line.startswith("@ ")
    )
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    wanted = copy.deepcopy(pruned).double()(x)[0].abs().sum().item()
    assert float(total) == pytest.approx(wanted, rel=1e-9)
    assert "train(trainer=prunus.integrations.ultralytics.DetectionTrainer)" in sentence
    assert missing == "None"


def test_the_trainer_keeps_the_pruned_widths(
    pruned: nn.Module, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = copy.deepcopy(pruned)
    model.names = {number: f"thing{number}" for number in range(80)} | {7: NAMES[0]}
    before = model.model[-1].cv3[0][-1].weight.detach().clone()
    bridge.save(model, "pruned.pt")
    assert model.yaml == pruned.yaml  # what is saved is a copy
    seen = []
    yolo = ultralytics.YOLO("pruned.pt")
    yolo.add_callback(
        "on_pretrain_routine_end",
        lambda trainer: seen.append(trainer.model.model[-1].cv3[0][-1].weight.detach().clone()),
    )
    yolo.train(
        trainer=bridge.DetectionTrainer, data=str(data), epochs=1, imgsz=32, batch=4,
        project=str(tmp_path), plots=False, amp=False, verbose=False,
    )  # fmt: skip
    classes = sum(  # one row and one bias a class, at three scales
        head[-1].in_channels + 1 for head in pruned.model[-1].cv3
    )
    assert count(yolo.model) == count(pruned) - 78 * classes
    assert torch.equal(seen[0][0], before[7])
    assert yolo.model.model[-1].no == 2 + 64
    last = next(tmp_path.rglob("last.pt"))
    assert count(ultralytics.YOLO(last).model) == count(yolo.model)
    with pytest.raises(KeyError, match="DetectionTrainer"):
        ultralytics.YOLO(last).train(data=str(data), epochs=1, imgsz=32, project=str(tmp_path))


class InterruptedRun(Exception):  # noqa: N818
    pass


def interrupt(trainer: object) -> None:
    raise InterruptedRun


def test_pruned_while_it_trains_interrupted_and_resumed(data: Path, tmp_path: Path) -> None:
    def pruning() -> bridge.Pruning:
        return bridge.Pruning(budget=prunus.Budget(macs=0.6), steps=2, verified=False)

    dense, far = [], []

    def look(trainer: object) -> None:
        dense.append(count(trainer.model))
        average = trainer.ema.ema.state_dict()
        far.append(max((average[n] - w).abs().max() for n, w in trainer.model.named_parameters()))

    yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.add_callback("on_train_batch_end", look)
    yolo.add_callback("on_fit_epoch_end", interrupt)
    pruning().attach(yolo)
    asked = {"imgsz": 32, "batch": 2, "plots": False, "amp": False, "optimizer": "SGD", "nbs": 2}
    with pytest.raises(InterruptedRun):
        yolo.train(
            trainer=bridge.DetectionTrainer, data=str(data), epochs=2, project=str(tmp_path),
            lr0=1e-3, **asked,
        )  # fmt: skip
    last = next(tmp_path.rglob("last.pt"))
    yolo = ultralytics.YOLO(last)
    half = count(yolo.model)
    assert half < dense[0]
    with pytest.raises(KeyError, match="this model was pruned"):
        ultralytics.YOLO(last).train(data=str(data), epochs=1, project=str(tmp_path))
    yolo.add_callback("on_train_batch_end", look)
    again = pruning().attach(yolo)
    yolo.train(trainer=bridge.DetectionTrainer, resume=True)
    assert again.schedule.round == 2
    assert dense == [dense[0]] * 2 + [half] * 2
    assert count(yolo.model) < half
    costs = again.schedule.plan.cost()["macs"]
    assert costs.share <= 0.6
    assert max(far[2:]) < 5 * max(far[:2])  # the average follows after the cut
    bridge.save(yolo, tmp_path / "pruned.pt")
    assert not hasattr(ultralytics.YOLO(tmp_path / "pruned.pt").model, "pruning")


def test_what_pruning_in_a_run_refuses() -> None:
    with pytest.raises(PlanError, match="floor"):
        bridge.Pruning(budget=prunus.Budget(macs=0.5), floor=0.5)
    begun = bridge.Pruning(budget=prunus.Budget(macs=0.5)).start
    args = SimpleNamespace(distill_model=None, compile=False)
    with pytest.raises(ModelError, match="several devices"):
        begun(SimpleNamespace(world_size=2, args=args))
    with pytest.raises(ModelError, match="would not resume"):
        begun(SimpleNamespace(world_size=0, args=args))


def test_trainers_can_be_imported_and_pickled() -> None:
    for name in bridge._TRAINERS:
        trainer = getattr(bridge, name)
        assert pickle.loads(pickle.dumps(trainer)) is trainer
        assert trainer.__mro__[1] is bridge.KeepsWidths
        assert trainer.__mro__[2].__name__ == name
    with pytest.raises(AttributeError, match="WorldTrainer"):
        _ = bridge.WorldTrainer


def test_what_can_not_be_trained_is_refused(pruned: nn.Module) -> None:
    trainer = object.__new__(bridge.DetectionTrainer)
    trainer.callbacks, trainer.resume = {bridge.Pruning.EVENT: []}, False
    trainer.data = {"nc": 80, "names": {}, "kpt_shape": [17, 3]}
    with pytest.raises(ModelError, match="only a YAML of the dense model"):
        trainer.get_model("yolov8n.yaml", None)
    fused = copy.deepcopy(pruned).fuse(verbose=False)
    with pytest.raises(ModelError, match="the model is fused"):
        trainer.get_model("yolov8n.yaml", fused)
    posed = copy.deepcopy(pruned)
    posed.model[-1].kpt_shape = (4, 2)
    with pytest.raises(ModelError, match=r"keypoints \[17, 3\], the model \[4, 2\]"):
        trainer.get_model("yolov8n.yaml", posed)


def test_a_file_that_needs_prunus_is_not_written(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    model.model[0].note = prunus.Budget(macs=0.5)
    (tmp_path / "pruned.pt").write_text("old")
    with pytest.raises(ModelError, match=r"only be opened where Prunus is installed\n.*Budget"):
        bridge.save(model, tmp_path / "pruned.pt")
    assert (tmp_path / "pruned.pt").read_text() == "old"
    assert os.listdir(tmp_path) == ["pruned.pt"]
    with pytest.raises(ModelError, match=r"does not end in \.pt"):
        bridge.save(model, tmp_path / "pruned.safetensors")
    with pytest.raises(ModelError, match="a Linear is no model of ultralytics"):
        bridge.save(nn.Linear(2, 2), tmp_path / "pruned.pt")


def test_the_command_line_writes_what_yolo_opens(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned.pt"
    asked = f"shrink yolo:yolov8n.yaml --input-shape 1,3,32,32 --macs 0.6 --no-verify --out {out}"
    assert main([*asked.split(), "--data", str(data)]) == 0
    assert count(ultralytics.YOLO(out).model) < 2_200_000
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert bridge.kept_whole(attention) == ("*in_proj_weight*",)
    assert bridge.kept_whole(nn.Sequential(nn.Linear(2, 2))) == ()


def test_the_images_of_a_data_yaml(data: Path, tmp_path: Path) -> None:
    images = bridge.training_images(data)
    assert [image.name for image in images] == ["0.png", "1.png", "2.png", "3.png"]
    listed = tmp_path / "train.txt"
    listed.write_text("./a.png\n" + str(images[2]))
    text = data.read_text().replace("train: images", f"train: {listed}")
    (tmp_path / "data.yaml").write_text(text)
    assert bridge.training_images(tmp_path / "data.yaml") == sorted([tmp_path / "a.png", images[2]])
    (tmp_path / "data.yaml").write_text("names: [a]")
    with pytest.raises(DataError, match="is no data set of ultralytics"):
        bridge.training_images(tmp_path / "data.yaml")
