"""Models of ultralytics: a ``.pt`` that ``YOLO()`` opens, and trainers that keep pruned widths.

ultralytics builds the model that it trains from a YAML, which knows the dense widths only.  The
trainers of this module train the pruned module itself; a file of :func:`save` can be trained by no
other, since its YAML can't be built.  Nothing of ultralytics is changed.
"""

from __future__ import annotations

import copy
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunus.errors import DataError, ModelError, checks_options, require
from prunus.files import replace_file

if TYPE_CHECKING:
    DetectionTrainer: Any
    SegmentationTrainer: Any
    PoseTrainer: Any
    OBBTrainer: Any
    ClassificationTrainer: Any
    RTDETRTrainer: Any

_TRAINERS = {
    "DetectionTrainer": ("ultralytics.models.yolo.detect", "DetectionModel"),
    "SegmentationTrainer": ("ultralytics.models.yolo.segment", "SegmentationModel"),
    "PoseTrainer": ("ultralytics.models.yolo.pose", "PoseModel"),
    "OBBTrainer": ("ultralytics.models.yolo.obb", "OBBModel"),
    "ClassificationTrainer": ("ultralytics.models.yolo.classify", "ClassificationModel"),
    "RTDETRTrainer": ("ultralytics.models.rtdetr.train", "RTDETRDetectionModel"),
}
"""Where ultralytics has each, and the class of model that it trains."""

_CLASS_LAYERS = ("cv3", "one2one_cv3", "enc_score_head", "dec_score_head", "denoising_class_embed")
"""In heads of ultralytics, what has one output (or embedding) for each class, at its end."""


class KeepsWidths:
    """For a trainer of ultralytics, as its first base class: it trains the module that it is given.

    Of another number of classes, only the layers with one output for each are made anew; classes of
    the same name keep theirs.

    Examples
    --------
    ``class Mine(KeepsWidths, ultralytics.models.yolo.detect.DetectionTrainer): ...``
    """

    args: Any
    data: Any

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """A copy of ``weights``, whatever ``cfg`` says.

        Raises
        ------
        ModelError
            If there are no weights; if they are fused, or have other keypoints than the data.
        """
        if weights is None:
            raise ModelError(
                "the trainer was given no module, only a YAML of the dense model",
                where=str(cfg),
                why="ultralytics hands a trainer the weights of a .pt file alone",
                fix='prunus.integrations.ultralytics.save(yolo.model, "pruned.pt"), then '
                'YOLO("pruned.pt").train(trainer=…)',
            )
        if weights.is_fused():
            raise ModelError(
                "the model is fused: its batch norms are folded into the convolutions",
                why="val(), predict() and export() of ultralytics fuse the module they are given",
                fix="open the file anew, and train before",
            )
        model = copy.deepcopy(weights).float().requires_grad_(True)
        model.criterion = None
        shape = self.data.get("kpt_shape")
        if shape is not None and list(shape) != list(getattr(model.model[-1], "kpt_shape", shape)):
            raise ModelError(
                f"the data has keypoints {list(shape)}, the model {list(model.model[-1].kpt_shape)}"
            )
        for module in model.modules():
            if isinstance(module, nn.Dropout) and getattr(self.args, "dropout", None):
                module.p = self.args.dropout
        names = self.data["names"] if self.args.cls_remap else {}
        _fit_classes(model, self.data["nc"], names)
        return mark(model)


def __getattr__(name: str) -> Any:
    """The trainers, made when they are first asked for: a pickle finds them by their name."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(require(_TRAINERS[name][0], "yolo"), name)
    doc = "ultralytics' own, for pruned models (:class:`KeepsWidths`)."
    made = type(name, (KeepsWidths, theirs), {"__module__": __name__, "__doc__": doc})
    return globals().setdefault(name, made)


def _fit_classes(model: Any, count: int, names: Mapping[int, str]) -> None:
    """Give the head another number of classes; classification heads are fitted by ultralytics.

    Classes of a name that the model has keep its weights.  Others begin with weights as spread as
    these are, and with their mean bias.
    """
    head = model.model[-1]
    known = {name: row for row, name in model.names.items() if name != str(row)}
    rows = [known.get(names.get(new, "")) for new in range(count)]
    same = rows == list(range(count)) or not any(row is not None for row in rows)
    if not hasattr(head, "nc") or (head.nc == count and same):
        return
    for holder, name in _class_layers(head):
        setattr(holder, name, _with_rows(getattr(holder, name), rows))
    head.nc = model.yaml["nc"] = count
    if hasattr(head, "no"):
        head.no = count + 4 * head.reg_max


def _class_layers(head: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names in them of layers with one output, or embedding, for each class."""
    for branch in _CLASS_LAYERS:
        part = getattr(head, branch, None)
        for holder, name in (
            [(part, key) for key in part._modules]
            if isinstance(part, nn.ModuleList)
            else [(head, branch)]
            if part is not None
            else []
        ):
            layer = getattr(holder, name)
            yield (
                (layer, str(len(layer) - 1)) if isinstance(layer, nn.Sequential) else (holder, name)
            )
    semantic = getattr(getattr(head, "proto", None), "semseg", None)
    if semantic is not None:
        yield semantic, str(len(semantic) - 1)


def _with_rows(layer: Any, rows: Sequence[int | None]) -> Any:
    """A layer whose outputs are these of the old one, and new ones where there is None."""
    new = copy.deepcopy(layer)
    for name, old in layer.named_parameters():
        old = old.detach()
        spread = old.std() if old.dim() > 1 else 0.0  # biases are alike
        data = torch.randn(len(rows), *old.shape[1:]).to(old) * spread
        data += 0 if old.dim() > 1 else old.mean()
        for place, row in enumerate(rows):
            if row is not None:
                data[place] = old[row]
        setattr(new, name, nn.Parameter(data))
    for name in ("out_channels", "out_features", "num_embeddings"):
        if hasattr(new, name):
            setattr(new, name, len(rows))
    return new


def mark(model: Any) -> Any:
    """Write into the model's YAML, in place of its first layer, which trainer it needs.

    So a plain ``train()``, which would build the dense model, stops with that sentence.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__]
    trainer = next((name for name, (_, kind) in _TRAINERS.items() if kind in kinds[:1]), None)
    if trainer is None:
        trainer = "a trainer that begins with KeepsWidths"
    model.yaml = copy.deepcopy(model.yaml)
    model.yaml["backbone"][0][2] = (
        "this model was pruned, and its YAML only knows the dense one: train it with "
        f"YOLO(file).train(trainer=prunus.integrations.ultralytics.{trainer})"
    )
    return model


@checks_options
def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a pruned model as the ``.pt`` that ``YOLO()`` opens, without Prunus.

    It is a pickle, as every ``.pt`` of ultralytics; open only those that you trust.  Tensors keep
    their dtype.  A plain ``train()`` on it stops with an error that names the trainer to use.

    Parameters
    ----------
    model
        A model of ultralytics, or the ``YOLO`` that holds it.
    path
        Has to end in ``.pt``; an old file stays whole until the new one is.

    Raises
    ------
    ModelError
        If it is no model of ultralytics, or has a module that only Prunus can open.
    FileError
        If the file can't be written.
    """
    inner = getattr(model, "model", None)  # of a YOLO the model, of a model its layers
    model = inner if hasattr(inner, "yaml") else model
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "yaml", None), dict):
        raise ModelError(
            f"a {type(model).__name__} is no model of ultralytics", why="it has no YAML"
        )
    if Path(path).suffix != ".pt":
        raise ModelError(f"{path} does not end in .pt", why="YOLO() opens no other")
    kept = mark(copy.deepcopy(model)).cpu()
    kept.criterion = None
    kept.args = dict(getattr(kept, "args", None) or {})
    ultralytics = require("ultralytics", "yolo")
    content = {
        "epoch": -1,
        "model": kept,
        "train_args": kept.args,
        "date": datetime.now().astimezone().isoformat(),
        "version": ultralytics.__version__,
    }

    def write(draft: Path) -> None:
        torch.save(content, draft)
        own = next(_needs_prunus(draft), None)
        if own is not None:
            raise ModelError(
                f"{path} could only be opened where Prunus is installed",
                why=f"the model has a {own}",
                fix="leave out with exclude= the heads of nn.MultiheadAttention, which takes no "
                "other number of them",
            )

    replace_file(path, write)


def training_images(path: Path) -> list[Path]:
    """The images for training that a ``data.yaml`` of ultralytics names; nothing is downloaded.

    Raises
    ------
    DataError
        If ultralytics can't read it, or there are none.
    """
    sets = require("ultralytics.data.utils", "yolo")
    try:
        train = sets.check_det_dataset(str(path), autodownload=False)["train"]
        files: list[Path] = []
        for place in map(Path, [train] if isinstance(train, str) else train):
            if place.is_dir():
                files += place.rglob("*")
            else:  # a list of paths, of which those that begin with a dot are relative to it
                lines = place.read_text(encoding="utf-8").split()
                files += [place.parent / line if line[0] == "." else Path(line) for line in lines]
    except Exception as error:  # ultralytics has many ways to say it
        raise DataError(f"{path} is no data set of ultralytics", why=str(error)) from error
    images = sorted(file for file in files if file.suffix.lower()[1:] in sets.IMG_FORMATS)
    if not images:
        raise DataError(f"{path} names no images for training")
    return images


def _needs_prunus(path: Path) -> Iterator[str]:
    """Names of Prunus that opening a file of ``torch.save`` would import."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        for operator, argument, _ in pickletools.genops(archive.read(pickled)):
            if operator.name == "GLOBAL" and str(argument).startswith("prunus."):
                yield str(argument).replace(" ", ".")
