"""A data set for detection, of a few small images with a box each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

NAMES = ("red", "blue")


def write_boxes(root: Path, *, images: int = 4, size: int = 32) -> Path:
    """Write images, labels and the ``data.yaml`` of ultralytics, and return the path of that."""
    pillow, noise = pytest.importorskip("PIL.Image"), np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for number in range(images):
        pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
        pillow.fromarray(pixels).save(root / "images" / f"{number}.png")
        (root / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.6 0.6\n")
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images\nval: images\nnames:\n{names}")
    return root / "data.yaml"
