"""Models of transformers from a folder on this machine: ``hf:FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.cli.source import Source, random_image
from prunus.errors import ModelError, require

_TOKENS = 16


def find_folder(place: str, options: argparse.Namespace) -> Source:
    """The class that ``architectures`` in config.json names, with the folder's safetensors.

    Nothing is downloaded, no code of the folder is run, and no pickle is read without
    ``--trust-pickle``.
    """
    folder = Path(place)
    config = _read_config(folder)
    kind = _find_class(config, options)

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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"there is no file {path}",
            why="hf: takes a folder on this machine; nothing is downloaded",
            fix="give the folder that save_pretrained() wrote",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON", why=str(error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is no configuration", why="it is no JSON object")
    return config


def _find_class(config: Mapping[str, Any], options: argparse.Namespace) -> Any:
    from prunus.integrations.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    transformers = require("transformers", "hf")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(
            f"transformers has no model class {name!r}",
            where=options.model,
            why="the class is what 'architectures' in config.json names"
            + ("; code that comes with a model is never run" if "auto_map" in config else ""),
            fix="write a file with a function that builds the model, and give file.py:FUNCTION",
        )
    return kind


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
    """Ids or an image, whichever the model takes first."""
    config: Any = model.config
    main: Any = model.main_input_name
    if main == "input_ids":
        shape = options.input_shape[0] if options.input_shape else (1, _TOKENS)
        random = torch.Generator().manual_seed(options.seed)
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(1, vocabulary, shape, generator=random)
        more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        return (), {"input_ids": ids, **more}
    size = getattr(config, "image_size", 224)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if main == "pixel_values":
        args, _ = random_image(options, (getattr(config, "num_channels", 3), *sides))
        return (), {"pixel_values": args[0]} if args else {}
    if options.input_shape:
        return (), {}
    raise ModelError(
        f"no example can be made of the model's input {main!r}",
        where=options.model,
        fix="give --input-shape, or write a file with a function, and give file.py:FUNCTION",
    )


def _normalisation(folder: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None
    found = json.loads(path.read_text(encoding="utf-8"))
    mean, std = found.get("image_mean"), found.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else (None, None)
