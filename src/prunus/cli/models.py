"""Where a model comes from, how it is built, and what its forward is called with."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunus.cli.python_file import find_beside, find_function
from prunus.errors import ModelError, require

if TYPE_CHECKING:
    from prunus import CouplingGraph

_REFERENCE = "write zoo:NAME, timm:NAME, hf:FOLDER, yolo:FILE or path/to/file.py:FUNCTION"
_YOLO = "write yolo:yolov8n.yaml, say"
_YOLO_SIZE = 320

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes
    ----------
    build
        Makes the model, its weights loaded.
    bare
        Makes it with any weights.
    examples
        From the built model, what its forward is called with: a tensor, a tuple of positional
        arguments, or a mapping of keyword arguments.
    mean, std
        What images are normalised with.
    folder
        Where a tokenizer may lie.
    shapes_examples
        Whether ``examples`` follows ``--input-shape`` itself, for inputs other than random floats.
    """

    build: Callable[[], nn.Module]
    bare: Callable[[], nn.Module]
    examples: Callable[[nn.Module], Any]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    folder: Path | None = None
    shapes_examples: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model, and what its forward is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: Source

    def trace(self, options: argparse.Namespace) -> CouplingGraph:
        """The coupling graph of the model."""
        import prunus

        return prunus.trace(self.model, self.args, self.kwargs, outputs=options.outputs)

    def costs(self, name: str) -> dict[str, Any]:
        """The costs of the model as it is now, counted by running it."""
        import prunus

        return {"name": name, **prunus.report.measure_costs(self.model, self.args, self.kwargs)}


def find_source(options: argparse.Namespace) -> Source:
    """What ``options.model`` refers to; :class:`~prunus.errors.ModelError` if that is nothing."""
    reference: str = options.model
    kind, colon, rest = reference.partition(":")
    if options.pretrained and kind not in ("zoo", "timm"):
        raise ModelError(
            "--pretrained is for models of the zoo and of timm",
            where=reference,
            fix="let the function load its weights",
        )
    found = {"zoo": _from_zoo, "timm": _from_timm, "hf": _from_folder, "yolo": _from_yolo}
    if colon and kind in found:
        return found[kind](rest, options)
    return _from_file(reference, options)


def load_model(options: argparse.Namespace) -> Loaded:
    """The model that ``options.model`` refers to, built with the seed.

    An error in the user's own code is raised as it is.
    """
    source = find_source(options)
    torch.manual_seed(options.seed)
    model = source.build()
    return Loaded(model, *example_inputs(source, model, options), source)


def example_inputs(source: Source, model: nn.Module, options: argparse.Namespace) -> Inputs:
    """What ``--input-shape`` asks for, else what the source knows."""
    if options.input_shape and not source.shapes_examples:
        return _draw(options.seed, *options.input_shape), {}
    found = source.examples(model)
    if isinstance(found, Mapping):
        return (), dict(found)
    return (found,) if isinstance(found, Tensor) else tuple(found), {}


def _draw(seed: int, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=random) for shape in shapes)


def _from_zoo(name: str, options: argparse.Namespace) -> Source:
    import models_zoo

    def build(pretrained: bool = options.pretrained) -> nn.Module:
        try:
            return models_zoo.build(name, pretrained=pretrained)
        except ValueError as error:  # unknown, or without trained weights
            raise ModelError(str(error), where=options.model) from error

    return Source(
        build, lambda: build(pretrained=False), lambda model: models_zoo.example_inputs(name)
    )


def _from_timm(name: str, options: argparse.Namespace) -> Source:
    timm = require("timm", "timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"timm has no model {name!r}",
            where=options.model,
            fix=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()",
        )
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    size, mean, std = (getattr(config, n, None) for n in ("input_size", "mean", "std"))

    def build() -> nn.Module:
        try:
            model: nn.Module = timm.create_model(name, pretrained=options.pretrained)
        except Exception as error:  # of timm, its hub and its network, which share no class
            if not options.pretrained:
                raise
            raise ModelError(
                f"the trained weights of {name} can't be had",
                where=options.model,
                why=f"{type(error).__name__}: {error}",
                fix="go online, or leave out --pretrained",
            ) from error
        return model

    shape = (1, *(size or (3, 224, 224)))
    return Source(
        build, lambda: timm.create_model(name), lambda _: _draw(options.seed, shape), mean, std
    )


def _from_folder(place: str, options: argparse.Namespace) -> Source:
    """The class that ``architectures`` in config.json names, with the folder's safetensors.

    Nothing is downloaded, no code of the folder is run, and no pickle is read without
    ``--trust-pickle``.
    """
    from prunus.integrations import hf

    folder = Path(place)
    _, kind = hf.read_config(folder, options.model)

    def build() -> nn.Module:
        safe = _has_safetensors(folder, options)
        if safe and hf.has_plan(folder):
            return hf.load(folder)
        with hf.without_bars():
            model: nn.Module = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=safe
            )
        return model

    def bare() -> nn.Module:
        model: nn.Module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        return model.eval()

    def examples(model: nn.Module) -> Any:
        if options.input_shape and model.main_input_name != "input_ids":
            return _draw(options.seed, *options.input_shape)
        tokens = options.input_shape[0] if options.input_shape else (1, hf.TOKENS)
        try:
            return hf.example_inputs(model, tokens=tokens, seed=options.seed)
        except ModelError as error:
            raise ModelError(
                error.what,
                where=options.model,
                fix="give --input-shape, or write a function, and give path/to/file.py:FUNCTION",
            ) from error

    images = folder / "preprocessor_config.json"
    found = json.loads(images.read_text(encoding="utf-8")) if images.is_file() else {}
    mean, std = found.get("image_mean"), found.get("image_std")
    return Source(build, bare, examples, mean, std, folder, shapes_examples=True)


def _has_safetensors(folder: Path, options: argparse.Namespace) -> bool:
    """Whether weights are read from safetensors; refused where neither they nor pickles may be."""
    if any(folder.glob("*.safetensors")):
        return True
    pickles = sorted(folder.glob("*.bin"))
    if pickles and options.trust_pickle:
        return False
    raise ModelError(
        f"there are no safetensors in {folder}",
        why=f"{pickles[0].name} is a pickle, which can run any code" if pickles else "",
        fix="give --trust-pickle if you trust where it comes from"
        if pickles
        else "write the weights with save_pretrained()",
    )


def _from_yolo(file: str, options: argparse.Namespace) -> Source:
    """A .yaml is built with random weights; a .pt is a pickle, and read only where trusted."""
    path = Path(file)
    if path.suffix not in (".yaml", ".yml", ".pt"):
        raise ModelError(f"{file} is neither a .yaml nor a .pt file", fix=_YOLO)
    if path.suffix == ".pt" and not path.is_file():
        raise ModelError(f"there is no file {file}", why="nothing is downloaded")
    if path.suffix == ".pt" and not options.trust_pickle:
        raise ModelError(
            f"{file} was not read",
            why="a .pt file of ultralytics is a pickle, which can run any code",
            fix="give --trust-pickle if you trust where it comes from",
        )
    for name, value in (("OFFLINE", "true"), ("AUTOINSTALL", "false"), ("VERBOSE", "false")):
        os.environ.setdefault(f"YOLO_{name}", value)
    ultralytics = require("ultralytics", "yolo")

    def build() -> nn.Module:
        logger = ultralytics.utils.LOGGER
        level = logger.level
        logger.setLevel(logging.ERROR)  # it may write to stdout, which has results only
        try:
            model: nn.Module = ultralytics.YOLO(str(path)).model
        except FileNotFoundError as error:
            why = "ultralytics has no configuration of that name either"
            raise ModelError(f"there is no file {file}", why=why, fix=_YOLO) from error
        finally:
            logger.setLevel(level)
        return model.float().eval()

    def examples(model: Any) -> Any:
        shape = (1, model.yaml.get("channels", 3), _YOLO_SIZE, _YOLO_SIZE)
        return _draw(options.seed, shape)

    return Source(build, build, examples, (0.0,), (1.0,))


def _from_file(reference: str, options: argparse.Namespace) -> Source:
    factory = find_function(reference, ModelError, _REFERENCE)

    def build() -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"{reference} returned a {type(model).__name__}",
                why="a model is a torch.nn.Module",
                fix="return the model from the function",
            )
        return model

    def examples(model: nn.Module) -> Any:
        function = find_beside(reference, "example_inputs")
        if function is None:
            raise ModelError(
                "there are no example inputs",
                where=reference,
                why="the file has no function example_inputs()",
                fix="add one, or give --input-shape 1,3,224,224, say",
            )
        return function()

    return Source(build, build, examples)
