"""Models of transformers from a folder on this machine: ``hf:FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prunus.cli.source import Source
from prunus.errors import ModelError, require
from prunus.integrations.hf import TOKENS, example_inputs, read_config


def find_folder(place: str, options: argparse.Namespace) -> Source:
    """The class that ``architectures`` in config.json names, with the folder's safetensors.

    Nothing is downloaded, no code of the folder is run, and no pickle is read without
    ``--trust-pickle``.
    """
    folder = Path(place)
    _, kind = read_config(folder, options.model)

    def build() -> nn.Module:
        _require_weights(folder, options)
        with _without_bars():
            model: nn.Module = kind.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=_safe(folder),
            )
        return model

    def bare() -> nn.Module:
        model: nn.Module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        return model.eval()

    mean, std = _normalisation(folder)
    return Source(build, bare, lambda model: _examples(model, options), mean, std, folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Its progress bars would run into ours."""
    logging = require("transformers", "hf").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _safe(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _require_weights(folder: Path, options: argparse.Namespace) -> None:
    pickles = sorted(folder.glob("*.bin"))
    if _safe(folder) or (pickles and options.trust_pickle):
        return
    raise ModelError(
        f"there are no safetensors in {folder}",
        why=f"{pickles[0].name} is a pickle, which can run any code" if pickles else "",
        fix="give --trust-pickle if you trust where it comes from"
        if pickles
        else "write the weights with save_pretrained()",
    )


def _examples(
    model: nn.Module, options: argparse.Namespace
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What the model takes first: ids, of a shape that may be given, an image or sound."""
    if options.input_shape and model.main_input_name != "input_ids":
        return (), {}
    tokens = options.input_shape[0] if options.input_shape else (1, TOKENS)
    try:
        return (), example_inputs(model, tokens=tokens, seed=options.seed)
    except ModelError as error:
        raise ModelError(
            error.what,
            where=options.model,
            fix="give --input-shape, or write a file with a function, and give file.py:FUNCTION",
        ) from error


def _normalisation(folder: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None
    found = json.loads(path.read_text(encoding="utf-8"))
    mean, std = found.get("image_mean"), found.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else (None, None)
