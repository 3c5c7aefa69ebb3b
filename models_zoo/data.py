"""Fashion-MNIST: the small subsets that ship with the zoo, the full set, and a score.

``python -m models_zoo.data --data FOLDER`` makes the shipped subsets again.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, scaled to 0..1
CALIBRATION_IMAGES, TEST_IMAGES = 512, 2000

FOLDER = Path(__file__).with_name("data")


class Images(NamedTuple):
    """Grey images, uint8 [N, 28, 28], and their classes, uint8 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def calibration() -> Images:
    """Return 512 images drawn from the training set."""
    return _load(FOLDER / "calibration.npz")


def test() -> Images:
    """Return the first 2,000 of the 10,000 test images."""
    return _load(FOLDER / "test.npz")


def load_full(folder: str | Path) -> tuple[Images, Images]:
    """Read the 60,000 training and 10,000 test images from the four idx ``.gz`` files.

    ``folder`` holds ``train-images-idx3-ubyte.gz`` and its three companions; Debian's package
    ``dataset-fashion-mnist`` has them in ``/usr/share/datasets/fashion-mnist``.
    """
    folder = Path(folder)
    train, held_out = (
        Images(
            read_idx(folder / f"{part}-images-idx3-ubyte.gz"),
            read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    )
    return train, held_out


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Scale uint8 [N, 28, 28] to zero mean and unit spread: float32 [N, 1, 28, 28]."""
    scaled = (images.astype(np.float32) / 255.0 - MEAN) / STD
    return torch.from_numpy(scaled.astype(np.float32, copy=False)).unsqueeze(1)


@overload
def batches(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], batch_size: int = ...
) -> Iterator[tuple[Tensor, Tensor]]: ...
@overload
def batches(
    images: NDArray[np.uint8], labels: None = ..., batch_size: int = ...
) -> Iterator[Tensor]: ...
def batches(
    images: NDArray[np.uint8], labels: NDArray[np.uint8] | None = None, batch_size: int = 128
) -> Iterator[tuple[Tensor, Tensor]] | Iterator[Tensor]:
    """Iterate in order over normalised batches, with int64 labels if labels are given."""
    starts = range(0, len(images), batch_size)
    inputs = (normalise(images[start : start + batch_size]) for start in starts)
    if labels is None:
        return inputs
    targets = torch.from_numpy(labels.astype(np.int64)).split(batch_size)
    return zip(inputs, targets, strict=True)


def accuracy(
    model: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    batch_size: int = 500,
) -> float:
    """Return the percentage of images that the model classifies correctly, in eval mode."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            correct = sum(
                int((model(inputs).argmax(1) == targets).sum())
                for inputs, targets in batches(images, labels, batch_size)
            )
    finally:
        model.train(training)
    return 100.0 * correct / len(images)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzipped idx file of unsigned bytes; the header names the shape."""
    content = gzip.decompress(path.read_bytes())
    kind, rank = content[2], content[3]
    if content[:2] != b"\0\0" or kind != 0x08:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (header {content[:4].hex()})")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=rank, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != math.prod(shape):
        raise ValueError(f"{path}: {values.size} bytes where the header promises shape {shape}")
    return values.reshape(shape)


def make_subsets(source: str | Path, target: Path = FOLDER, seed: int = 0) -> None:
    """Draw the shipped subsets from the full set and write them to ``target``.

    A training image that is also among the test images is never drawn.
    """
    train, held_out = load_full(source)
    seen = {image.tobytes() for image in held_out.images}
    order = np.random.default_rng(seed).permutation(len(train.images))
    chosen = [index for index in order if train.images[index].tobytes() not in seen]
    picked = np.sort(np.asarray(chosen[:CALIBRATION_IMAGES]))
    target.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        target / "calibration.npz", images=train.images[picked], labels=train.labels[picked]
    )
    np.savez_compressed(
        target / "test.npz",
        images=held_out.images[:TEST_IMAGES],
        labels=held_out.labels[:TEST_IMAGES],
    )


def _load(path: Path) -> Images:
    with np.load(path, allow_pickle=False) as arrays:
        return Images(arrays["images"], arrays["labels"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the shipped subsets again from the full set."""
    parser = argparse.ArgumentParser(prog="python -m models_zoo.data", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the idx .gz files")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make_subsets(options.data, options.out, options.seed)


if __name__ == "__main__":
    main()
