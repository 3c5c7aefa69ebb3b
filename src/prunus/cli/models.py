"""Find the model that a reference means, and its example inputs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.cli.python_file import find_beside, find_function
from prunus.cli.source import Source, random_image
from prunus.errors import ModelError, require

_REFERENCE = "write zoo:NAME, timm:NAME, hf:FOLDER, yolo:FILE or path/to/file.py:FUNCTION"


@dataclass(frozen=True)
class Loaded:
    """A model, and what its forward is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: Source


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


def _from_folder(folder: str, options: argparse.Namespace) -> Source:
    from prunus.cli.hugging_face import find_folder

    return find_folder(folder, options)


def _from_yolo(file: str, options: argparse.Namespace) -> Source:
    from prunus.cli.yolo import find_yolo

    return find_yolo(file, options)


def load_model(options: argparse.Namespace) -> Loaded:
    """The model that ``options.model`` refers to, built with the seed.

    An error in the user's own code is raised as it is.
    """
    source = find_source(options)
    torch.manual_seed(options.seed)
    model = source.build()
    args, kwargs = example_inputs(source, model, options)
    return Loaded(model, args, kwargs, source)


def example_inputs(
    source: Source, model: nn.Module, options: argparse.Namespace
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What ``--input-shape`` asks for, else what the source knows."""
    args, kwargs = source.examples(model)
    if options.input_shape and not args and not kwargs:
        random = torch.Generator().manual_seed(options.seed)
        return tuple(torch.randn(shape, generator=random) for shape in options.input_shape), {}
    return args, kwargs


def _from_zoo(name: str, options: argparse.Namespace) -> Source:
    import models_zoo

    def build(pretrained: bool = options.pretrained) -> nn.Module:
        try:
            return models_zoo.build(name, pretrained=pretrained)
        except ValueError as error:  # unknown, or without trained weights
            raise ModelError(str(error), where=options.model) from error

    def examples(model: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return (() if options.input_shape else tuple(models_zoo.example_inputs(name))), {}

    return Source(build, lambda: build(pretrained=False), examples)


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

    return Source(
        build,
        lambda: timm.create_model(name),
        lambda model: random_image(options, tuple(size or (3, 224, 224))),
        mean,
        std,
    )


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

    def examples(model: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if options.input_shape:
            return (), {}
        function = find_beside(reference, "example_inputs")
        if function is None:
            raise ModelError(
                "there are no example inputs",
                where=reference,
                why="the file has no function example_inputs()",
                fix="add one, or give --input-shape 1,3,224,224, say",
            )
        found = function()
        if isinstance(found, Mapping):
            return (), dict(found)
        return (found,) if isinstance(found, Tensor) else tuple(found), {}

    return Source(build, build, examples)
