"""Calibration data: a folder of images, an array, lines of text, or a user's own function."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.calibration.batches import Batches
from prunus.cli.models import Loaded
from prunus.cli.python_file import find_function
from prunus.cli.values import IMAGES, TOKENIZERS
from prunus.errors import DataError, require
from prunus.graph.program import tensors_of
from prunus.importance import needs_of
from prunus.integrations.ultralytics import training_images

_BATCH = 64
"""Samples in a batch that is cut from an array or a folder."""
_LINES, _TOKENS = 16, 128
_REFERENCE = "write a folder of images, FILE.npz, FILE.txt, data.yaml or path/to/file.py:FUNCTION"


def load_data(options: argparse.Namespace, loaded: Loaded) -> Iterable[Any] | None:
    """Calibration batches, or None if none were asked for and none are needed."""
    if options.data is not None:
        return Batches(_batches(options, loaded), options.samples)
    needs = needs_of(options.importance) if hasattr(options, "importance") else ()
    if needs:
        raise DataError(
            f"--importance {options.importance} needs calibration data",
            why=f"it is computed from {' and '.join(sorted(needs))} statistics",
            fix="give --data, or an importance of the weights alone: l2",
        )
    return None


def _batches(options: argparse.Namespace, loaded: Loaded) -> Iterable[Any]:
    reference: str = options.data
    path = Path(reference)
    if path.is_dir():
        return _image_batches(_images_in(path), options, loaded)
    if path.suffix in (".yaml", ".yml"):
        return _image_batches(training_images(path), options, loaded)
    if path.suffix in (".npz", ".txt"):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        return _array_batches(path) if path.suffix == ".npz" else _texts(path, options, loaded)
    if ".py" not in reference:
        raise DataError(
            f"{reference} is no calibration data"
            if path.is_file()
            else f"there is no file or folder {reference}",
            why="files that end in .npz, .txt and .yaml are known",
            fix=_REFERENCE,
        )
    batches = find_function(reference, DataError, _REFERENCE)()
    if not isinstance(batches, Iterable):
        raise DataError(
            f"{reference} returned a {type(batches).__name__}",
            why="calibration data is an iterable of batches",
            fix="return a DataLoader or a list of batches",
        )
    return batches


@dataclass(frozen=True)
class _Images:
    """Batches of the images in a folder, read as they are needed."""

    files: Sequence[Path]
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return -(-len(self.files) // _BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        files = iter(self.files)
        while batch := list(islice(files, _BATCH)):
            yield torch.stack([self.read(file) for file in batch])

    def read(self, file: Path) -> Tensor:
        pillow, fitting = require("PIL.Image", "images"), require("PIL.ImageOps", "images")
        channels, height, width = self.shape
        try:
            with pillow.open(file) as image:
                whole = fitting.exif_transpose(image).convert("L" if channels == 1 else "RGB")
                fitted = fitting.fit(whole, (width, height), pillow.Resampling.BICUBIC)
        except Exception as error:  # decoders, and who patches Pillow, have many ways to say it
            raise DataError(f"{file} is no image that can be read", why=str(error)) from error
        values = torch.from_numpy(np.array(fitted, dtype=np.float32) / 255)
        values = values[None] if channels == 1 else values.permute(2, 0, 1)
        return (values - self.mean) / self.std


def _image_batches(files: Sequence[Path], options: argparse.Namespace, loaded: Loaded) -> _Images:
    require("PIL.Image", "images")
    files = files[: options.samples]
    shape = _image_shape(loaded)
    mean = _per_channel(options.mean or loaded.source.mean or (0.0,), shape[0], "--mean")
    std = _per_channel(options.std or loaded.source.std or (1.0,), shape[0], "--std")
    if not bool((std > 0).all()):
        raise DataError("--std has a number that is not above zero", fix="give one above zero")
    found = _Images(files, shape, mean, std)
    for file in files:  # refuse unreadable files before the work, not after it
        found.read(file)
    return found


def _images_in(folder: Path) -> list[Path]:
    kinds = [pattern.removeprefix("*") for pattern in IMAGES]
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in kinds and f.is_file())
    if not files:
        raise DataError(
            f"there are no images in {folder}",
            why=f"files that end in {', '.join(kinds)} are taken for images",
        )
    return files


def _image_shape(loaded: Loaded) -> tuple[int, int, int]:
    """Channels, height and width of the model's only input."""
    inputs = [tensor for _, tensor in tensors_of([loaded.args, dict(loaded.kwargs)])]
    shape = tuple(inputs[0].shape[1:]) if len(inputs) == 1 and inputs[0].dim() == 4 else ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        given = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        raise DataError(
            "images don't fit this model",
            why=f"it takes {given or 'nothing'}, images are [N, 1 or 3, height, width]",
            fix="give --input-shape, or write a function that returns batches: file.py:FUNCTION",
        )
    return shape[0], shape[1], shape[2]


def _per_channel(values: Sequence[float], channels: int, option: str) -> Tensor:
    if len(values) not in (1, channels):
        raise DataError(
            f"{option} has {len(values)} numbers", why=f"the images have {channels} channels"
        )
    return torch.tensor(values).expand(channels).reshape(-1, 1, 1)


def _array_batches(path: Path) -> Sequence[Tensor]:
    """Batches of the array ``inputs``, or of the only one; float64 becomes float32."""
    name, array = _array_in(path)
    if array.ndim == 0 or array.dtype.kind not in "fi" or not len(array):
        none = array.ndim > 0 and not len(array)
        raise DataError(
            f"the array {name!r} is {array.dtype} of shape {array.shape}",
            where=str(path),
            why="it has no samples" if none else "it is fed in batches along its first dim",
            fix="save floats, or ids as signed integers, prepared as the model wants them",
        )
    single = array.astype(np.float32) if array.dtype == np.float64 else array
    return list(torch.from_numpy(single).split(_BATCH))


def _array_in(path: Path) -> tuple[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays.files)
            chosen = ["inputs"] if "inputs" in names else names
            if len(chosen) == 1:
                return chosen[0], arrays[chosen[0]]
    except Exception as error:  # numpy, zipfile and zlib have many ways to say it
        raise DataError(f"{path} can't be read", why=f"{type(error).__name__}: {error}") from error
    raise DataError(
        f"{path} has several arrays and none is called 'inputs'",
        why=f"it has {', '.join(names)}" if names else "it is empty",
        fix="save it with numpy.savez(file, inputs=…)",
    )


def _texts(path: Path, options: argparse.Namespace, loaded: Loaded) -> list[dict[str, Tensor]]:
    """Batches of ids and attention masks, one text a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text", why=str(error), fix="save it as UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip()][: options.samples]
    if not lines:
        raise DataError(f"there is no text in {path}", why="it has no line that is not blank")
    tokenizer = _tokenizer(path, options.tokenizer or loaded.source.folder)
    padding = tokenizer.pad_token is not None
    step = _LINES if padding else 1
    how = {"padding": padding, "truncation": True, "max_length": _TOKENS}
    return [
        dict(tokenizer(lines[start : start + step], return_tensors="pt", **how))
        for start in range(0, len(lines), step)
    ]


def _tokenizer(path: Path, place: Any) -> Any:
    """The tokenizer of a folder, which pads with its end of text if with nothing else."""
    fix = "give --tokenizer FOLDER, written by save_pretrained()"
    if place is None or not Path(place).is_dir():
        why = f"there is no folder {place}" if place else "only an hf: model brings one along"
        raise DataError("a text file needs a tokenizer", where=str(path), why=why, fix=fix)
    if not any(next(Path(place).glob(pattern), None) for pattern in TOKENIZERS):
        raise DataError(f"there is no tokenizer in {place}", why="its files are missing", fix=fix)
    transformers = require("transformers", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers have many ways to say it
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"the tokenizer in {place} can't be read", why=why, fix=fix) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
