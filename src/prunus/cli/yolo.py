"""Models of ultralytics: ``yolo:FILE``."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prunus.cli.source import Source, random_image
from prunus.errors import ModelError, require

_SIZE = 320


def find_yolo(file: str, options: argparse.Namespace) -> Source:
    """A .yaml is built with random weights; a .pt is a pickle, and read only where trusted."""
    path = Path(file)
    if path.suffix not in (".yaml", ".yml", ".pt"):
        raise ModelError(
            f"{file} is neither a .yaml nor a .pt file", fix="write yolo:yolov8n.yaml, say"
        )
    if path.suffix == ".pt":
        if not path.is_file():
            raise ModelError(f"there is no file {file}", why="nothing is downloaded")
        if not options.trust_pickle:
            raise ModelError(
                f"{file} was not read",
                why="a .pt file of ultralytics is a pickle, which can run any code",
                fix="give --trust-pickle if you trust where it comes from",
            )
    ultralytics = _ultralytics()

    def build() -> nn.Module:
        try:
            with _quiet(ultralytics.utils.LOGGER):
                model: nn.Module = ultralytics.YOLO(str(path)).model
        except FileNotFoundError as error:
            raise ModelError(
                f"there is no file {file}",
                why="ultralytics has no configuration of that name either",
                fix="write yolo:yolov8n.yaml, say",
            ) from error
        return model.float().eval()

    def examples(model: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return random_image(options, (model.yaml.get("channels", 3), _SIZE, _SIZE))

    return Source(
        build,
        build,
        examples,
        (0.0,),
        (1.0,),
    )


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """It may write to stdout, which has results only."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _ultralytics() -> Any:

    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    return require("ultralytics", "yolo")
