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
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunus.errors import DataError, ModelError, PlanError, checks_options, require
from prunus.files import replace_file
from prunus.integrations.ultralytics_head import fit_classes
from prunus.training.schedule import Schedule

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

_PRUNED = "this model was pruned"

_STATE = "pruning"
"""In a checkpoint, where the average has the state of a schedule, and the original on meta."""


class KeepsWidths:
    """For a trainer of ultralytics, as its first base class: it trains the module that it is given.

    Of another number of classes, only the layers with one output for each are made again; classes
    of the same name keep theirs.

    Examples
    --------
    ``class Mine(KeepsWidths, ultralytics.models.yolo.detect.DetectionTrainer): ...``
    """

    args: Any
    data: Any
    callbacks: Any
    resume: Any

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """A copy of ``weights``, whatever ``cfg`` says.

        Raises
        ------
        ModelError
            If there are no weights; if they are fused, or have other keypoints than the data.
        """
        pruning = next((c for c in self.callbacks[Pruning.EVENT] if isinstance(c, Pruning)), None)
        if weights is None and pruning is not None:
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        _check_weights(weights, cfg)
        if self.resume and pruning is not None and hasattr(weights, _STATE):
            return mark(pruning.resume(weights, self.args.imgsz))
        model = copy.deepcopy(weights).float().requires_grad_(True)
        model.criterion = None
        vars(model).pop(_STATE, None)
        _check_keypoints(model, self.data.get("kpt_shape"))
        for module in model.modules():
            if isinstance(module, nn.Dropout) and getattr(self.args, "dropout", None):
                module.p = self.args.dropout
        names = self.data["names"] if self.args.cls_remap else {}
        fit_classes(model, self.data["nc"], names)
        marked = pruning is None or _is_marked(weights)
        return mark(model) if marked else model


def _check_weights(weights: Any, cfg: Any) -> None:
    """Refuse what can't be trained on."""
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
            fix="open the file again, and train before",
        )


def _check_keypoints(model: Any, shape: Any) -> None:
    """Refuse data of other keypoints than the model's."""
    if shape is not None and list(shape) != list(getattr(model.model[-1], "kpt_shape", shape)):
        raise ModelError(
            f"the data has keypoints {list(shape)}, the model {list(model.model[-1].kpt_shape)}"
        )


@checks_options
class Pruning:
    """Prunes the model of a trainer in rounds while it trains, on a :class:`prunus.Schedule`.

    A round is done at the end of an epoch, before it is validated and saved: with the optimizer and
    the average of the weights, whose best checkpoint starts again.  After an epoch with an infinite
    loss it waits, since ultralytics goes back to the last checkpoint.  To resume, open ``last.pt``,
    attach the same and call ``train(resume=True, trainer=…)``: the checkpoint has the rounds that
    are done, and what the original model was.

    Parameters
    ----------
    **options
        Of :class:`prunus.Schedule`; not ``floor``.

    Examples
    --------
    ``Pruning(budget=prunus.Budget(macs=0.5)).attach(yolo)``, then
    ``yolo.train(trainer=DetectionTrainer, …)``.
    """

    EVENT = "on_train_epoch_end"

    def __init__(self, **options: Any) -> None:
        if "floor" in options:
            raise PlanError("Pruning takes no floor=", why="the average would not be put back")
        self._options = options
        self.schedule: Schedule | None = None
        self._original: Any = None

    def attach(self, yolo: Any) -> Pruning:
        """Have the next ``train`` of a ``YOLO`` call it."""
        yolo.add_callback("on_train_start", self.start)
        yolo.add_callback(self.EVENT, self)
        return self

    def start(self, trainer: Any) -> None:
        """Trace the model, and check that a plan can be made.

        Raises
        ------
        ModelError
            If the trainer uses several processes or distils, or is not one of this module.
        PlanError, BudgetError, DataError, VerifyError
            As from :class:`prunus.Schedule`.
        """
        if trainer.world_size > 1 or trainer.args.distill_model or trainer.args.compile:
            raise ModelError(
                "the model can't be pruned in this run",
                why="it runs on several devices, distils, or is compiled: a wrapper holds it",
                fix="prune it before, and train the pruned file",
            )
        if KeepsWidths not in type(trainer).__mro__:
            raise ModelError(
                f"{type(trainer).__name__} would not resume a pruned model",
                fix="give train() a trainer of prunus.integrations.ultralytics",
            )
        if self.schedule is None or self.schedule.model is not trainer.model:
            self._begin(trainer.model, trainer.args.imgsz)
        self._note(trainer)

    def _begin(self, model: Any, size: int, **more: Any) -> Schedule:
        first = next(model.parameters())
        x = torch.rand(1, model.yaml.get("channels", 3), size, size, device=first.device)
        self._original = _emptied(model, "meta")
        self._original.criterion = None
        exclude = self._options.get("exclude", ())
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        options = self._options | {"exclude": exclude + kept_whole(model)}
        self.schedule = Schedule(model, x, **options | more)
        return self.schedule

    def resume(self, weights: Any, size: int) -> Any:
        """The model of a checkpoint, after the rounds that it has, with its weights."""
        state, original = getattr(weights, _STATE)
        model = _emptied(original, "cpu")
        # What was held is in the state; there are no weights to verify with.
        schedule = self._begin(model, size, verified=False)
        schedule.load_state_dict(state)
        model.load_state_dict(weights.float().state_dict())
        return model.requires_grad_(True)

    def __call__(self, trainer: Any) -> None:
        """Prune if a round is due."""
        assert self.schedule is not None, "start() runs before"
        if not bool(torch.isfinite(trainer.loss)):
            return
        done = self.schedule.step(
            (trainer.epoch + 1) / trainer.epochs,
            optimizer=trainer.optimizer,
            ema=trainer.ema,
            scheduler=trainer.scheduler,
        )
        if done is None:
            return
        trainer.ema._pairs = None  # the tensors that its update follows
        mark(trainer.model)
        mark(trainer.ema.ema)
        trainer.best_fitness = None  # else best.pt would be the dense model
        trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch
        self._note(trainer)
        require("ultralytics", "yolo").utils.LOGGER.info(f"prunus: {done}")

    def _note(self, trainer: Any) -> None:
        """Keep in the average, which is what a checkpoint has, how to go on."""
        assert self.schedule is not None
        setattr(trainer.ema.ema, _STATE, (self.schedule.state_dict(), self._original))


def kept_whole(model: nn.Module) -> tuple[str, ...]:
    """Globs for ``exclude=``, so that a file of the pruned model can be opened without Prunus.

    ``nn.MultiheadAttention`` (in RT-DETR) takes no other number of heads or head dims; where it is
    pruned, an attention of Prunus stands in its place.
    """
    attends = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    return ("*in_proj_weight*",) if attends else ()


def _emptied(model: nn.Module, device: str) -> Any:
    """A copy with uninitialised tensors; ``to_empty`` fails on models of ultralytics."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(
        model,
        {
            id(tensor): nn.Parameter(empty, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else empty
            for tensor in held
            for empty in [torch.empty_like(tensor.detach(), device=device)]
        },
    )


def _is_marked(model: Any) -> bool:
    """Whether the YAML says that the model was pruned."""
    return str(model.yaml["backbone"][0][2]).startswith(_PRUNED)


def __getattr__(name: str) -> Any:
    """The trainers, made when they are first asked for: a pickle finds them by their name."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(require(_TRAINERS[name][0], "yolo"), name)
    doc = "ultralytics' own, for pruned models (:class:`KeepsWidths`)."
    made = type(name, (KeepsWidths, theirs), {"__module__": __name__, "__doc__": doc})
    return globals().setdefault(name, made)


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
        f"{_PRUNED}, and its YAML only knows the dense one: train it with "
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
    vars(kept).pop(_STATE, None)
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
                fix="prune with exclude=prunus.integrations.ultralytics.kept_whole(model)",
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
