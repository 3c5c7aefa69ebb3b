"""Models of transformers: example inputs, and folders that load again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from prunus.checkpoint import load as load_file
from prunus.checkpoint import save as save_file
from prunus.errors import FormatError, ModelError, checks_options, require
from prunus.files import replace_file
from prunus.integrations.hf_config import fitting_config
from prunus.surgeon.snapshot import all_or_nothing, config_before

TOKENS = 16
"""Length of an example text."""

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@checks_options
def example_inputs(
    model: nn.Module, *, tokens: tuple[int, ...] = (1, TOKENS), seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the forward of a model of transformers: random ids, image or sound.

    Parameters
    ----------
    tokens
        Shape of the ids, ``(batch, length)``.

    Raises
    ------
    ModelError
        For a model that does not say what it takes.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ModelError(
            "example inputs are missing",
            why="only a model of transformers says itself what it takes",
            fix="give args or kwargs: what the forward is called with",
        )
    random = torch.Generator().manual_seed(seed)
    if main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(1, vocabulary, tokens, generator=random)
        found = {"input_ids": ids}
        if hasattr(config, "vision_config"):
            found["pixel_values"] = _image(config.vision_config, tokens[0], random)
    elif main == "pixel_values":
        found = {"pixel_values": _image(config, tokens[0], random)}
    elif main == "input_features":
        length = 2 * config.max_source_positions
        shape = (tokens[0], config.num_mel_bins, length)
        found = {"input_features": torch.randn(shape, generator=random)}
    else:
        raise ModelError(
            f"no example can be made of the model's input {main!r}",
            fix="give args or kwargs: what the forward is called with",
        )
    if config.is_encoder_decoder:
        vocabulary = config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(1, vocabulary, tokens, generator=random)
        found["decoder_input_ids"] = found.get("input_ids", ids)
    return found


def _image(config: Any, batch: int, random: torch.Generator) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    shape = (batch, getattr(config, "num_channels", 3), *sides)
    return torch.randn(shape, generator=random)


@checks_options
@all_or_nothing
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    mode: Literal["free", "uniform"] = "free",
) -> None:
    """Write a pruned model of transformers to a folder.

    Parameters
    ----------
    mode
        ``"free"``: config.json of the architecture as it was, and one safetensors file with the
        weights and the plan, for :func:`load`.  ``"uniform"``: config.json of the smaller
        architecture and plain weights, for ``from_pretrained`` of the unmodified library; possible
        where the config can say every width, which is verified before anything is written.

    Raises
    ------
    ModelError
        For a model that is none of transformers, or one that config.json can't describe; the
        message names the tensors that the library would build with other shapes.
    """
    place = Path(folder)
    _refuse_others(model)
    if mode == "uniform":
        smaller = fitting_config(model, example_inputs(model))
        place.mkdir(parents=True, exist_ok=True)
        with _config_instead(model, smaller), TemporaryDirectory(dir=place) as draft:
            model.save_pretrained(draft)  # type: ignore[operator]
            for path in sorted(Path(draft).iterdir(), key=lambda path: path.name == CONFIG):
                os.replace(path, place / path.name)  # the config last: it says what the rest is
        return
    place.mkdir(parents=True, exist_ok=True)
    save_file(model, place / WEIGHTS)
    whole = {**config_before(model).to_dict(), "architectures": [type(model).__name__]}
    text = json.dumps(whole, indent=2)
    replace_file(place / CONFIG, lambda draft: draft.write_text(text + "\n", encoding="utf-8"))


@checks_options
def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that :func:`save` wrote, to the bit; nothing is downloaded, no code is run.

    Raises
    ------
    ModelError, FormatError
        If the folder has no config, an unknown class, or damaged weights.
    """
    place = Path(folder)
    config, kind = read_config(place)
    if not (place / WEIGHTS).is_file():
        raise FormatError(
            f"there is no {WEIGHTS}", where=str(place), fix="give the folder that save() wrote"
        )
    made = kind.config_class.from_dict(config)
    model: nn.Module = load_file(place / WEIGHTS, build=lambda: kind(made).eval())
    return model


@checks_options
def read_config(folder: Path, where: str = "") -> tuple[dict[str, Any], Any]:
    """config.json of a folder, and the model class of transformers that it names.

    ``where`` is what errors call the folder.
    """
    path = folder / CONFIG
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
    return config, _find_class(config, where or str(folder))


def _find_class(config: Mapping[str, Any], where: str) -> Any:
    transformers = require("transformers", "hf")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(
            f"transformers has no model class {name!r}",
            where=where,
            why="the class is what 'architectures' in config.json names"
            + ("; code that comes with a model is never run" if "auto_map" in config else ""),
            fix="write a file with a function that builds the model, and give file.py:FUNCTION",
        )
    return kind


def _refuse_others(model: nn.Module) -> None:
    if getattr(model, "config", None) is None or not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers", fix="write it with prunus.save"
        )


@contextmanager
def _config_instead(model: Any, config: Any) -> Iterator[None]:
    before = model.config
    model.config = config
    try:
        yield
    finally:
        model.config = before
