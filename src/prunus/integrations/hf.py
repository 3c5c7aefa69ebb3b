"""Models of transformers: example inputs, and folders that load again."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunus.checkpoint import load as load_file
from prunus.checkpoint import save as save_file
from prunus.checkpoint.container import open_container
from prunus.errors import FileError, FormatError, ModelError, checks_options, require
from prunus.integrations.hf_config import fitting_config
from prunus.surgeon.snapshot import all_or_nothing, applied_plan, config_before

TOKENS = 16
"""Length of an example text."""

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
CARD = "README.md"

SHARD = "5GB"
"""Weights of more than this are written to several files."""

_READ_FIRST = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin*")
"""Weights that ``from_pretrained`` finds in a folder."""

_NOT_COPIED = (".*", "*.safetensors", "*.index.json", "*.bin", "*.h5", "*.msgpack", "*.onnx",
               "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.py")  # fmt: skip
"""Files of a source folder that are weights, code or hidden."""


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
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write a pruned model of transformers to a folder, all of it or nothing.

    Parameters
    ----------
    mode
        ``"free"``: config.json of the architecture as it was, and one safetensors file with the
        weights and the plan, for :func:`load`.  ``"uniform"``: config.json of the smaller
        architecture and plain weights (several files above 5 GB), for ``from_pretrained`` of the
        unmodified library; possible where the config can express every width, which is verified
        before anything is written.
    source
        The folder that the model was read from: its tokenizer, preprocessor and model card are
        copied, and the card says what was done.

    Raises
    ------
    ModelError
        For a model that is none of transformers, or one that config.json can't describe; the
        message names the tensors that the library would build with other shapes.
    """
    _refuse_others(model)
    if source is not None and not Path(source).is_dir():
        raise ModelError(f"there is no folder {source}", fix="give source= the original's folder")
    kind: Any = model
    config = fitting_config(model, example_inputs(model)) if mode == "uniform" else None
    with new_folder(Path(folder)) as draft:
        if config is not None:
            with _config_instead(model, config), without_bars():
                kind.save_pretrained(draft, max_shard_size=SHARD)
        else:
            save_file(model, draft / WEIGHTS)
            before = {**config_before(model).to_dict(), "architectures": [type(model).__name__]}
            text = json.dumps(before, indent=2) + "\n"
            (draft / CONFIG).write_text(text, encoding="utf-8")
            if kind.can_generate():
                kind.generation_config.save_pretrained(draft)
        if source is not None:
            _copy_beside(Path(source), draft)
            with (draft / CARD).open("a", encoding="utf-8") as card:
                card.write(_describe(model, mode))


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when it is whole.

    Where there is one already, its files are replaced one by one, config.json last; weights of
    other names are removed.
    """
    draft = place.with_name(f".prunus-{secrets.token_hex(6)}")
    try:
        draft.mkdir(parents=True)
        yield draft
        if not place.exists() or not any(place.iterdir()):
            os.replace(draft, place)
            return
        names = sorted(os.listdir(draft), key=lambda name: name == CONFIG)
        for name in names[:-1]:
            os.replace(draft / name, place / name)
        for path in [path for kind in _READ_FIRST for path in place.glob(kind)]:
            if path.name not in names:
                path.unlink(missing_ok=True)
        os.replace(draft / CONFIG, place / CONFIG)
    except OSError as error:
        raise FileError(f"{place} can't be written", why=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
    if not any(place.glob("*.safetensors")):
        raise FormatError(
            f"there is no {WEIGHTS}", where=str(place), fix="give the folder that save() wrote"
        )
    model: Any
    if not has_plan(place):
        options = {"local_files_only": True, "use_safetensors": True, "dtype": "auto"}
        with without_bars():
            model = kind.from_pretrained(place, **options).eval()
    else:
        made = kind.config_class.from_dict(config)
        model = load_file(place / WEIGHTS, build=lambda: kind(made).eval())
        if (place / GENERATION).is_file():
            model.generation_config = type(model.generation_config).from_pretrained(place)
    return model  # type: ignore[no-any-return]


def has_plan(folder: Path) -> bool:
    """Whether a folder has weights and a plan for the architecture that its config describes."""
    if not (folder / WEIGHTS).is_file():
        return False
    with open_container(folder / WEIGHTS) as container:
        return "prunus" in container.metadata


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the library's progress bars, which would run into ours."""
    logging = require("transformers", "hf").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _copy_beside(source: Path, draft: Path) -> None:
    """Copy what a folder has beside the weights and configs of a model."""
    for path in sorted(source.iterdir()):
        taken = (draft / path.name).exists() or any(map(path.match, _NOT_COPIED))
        if path.is_file() and not taken:
            shutil.copyfile(path, draft / path.name)


def _describe(model: nn.Module, mode: str) -> str:
    """What was done to a model, for its card."""
    plan = applied_plan(model)
    how = "from_pretrained" if mode == "uniform" else "prunus.integrations.hf.load"
    lines = ["", "## Pruning", "", f"Pruned with Prunus; it loads with `{how}`."]
    if plan is not None:
        lines += ["", "| | before | after |", "|---|---:|---:|"]
        lines += [f"| {n} | {a:,} | {b:,} |" for n, (a, b) in sorted(plan.costs.items())]
        if plan.drops:
            lines += ["", f"Dropped layers: {', '.join(plan.drops)}."]
    return "\n".join([*lines, ""])


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
