"""Photos without labels, for agreement with a dense model: cut-outs on white, squared.

They are those of Debian's ``tuxpaint-stamps-default`` (GPL-2 in the parts seen: used where it is
installed, never copied), in ``/usr/share/tuxpaint/stamps``; drawings and mirrored copies are left
out.  The split is one of source pictures, in an order that their names alone decide.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/tuxpaint/stamps")
DRAWN = ("cartoon", "symbols", "text", "letters", "numbers")
VARIANTS = ("_mirror", "_flip", "_mirror_flip")
LEAST = 60
"""Pixels of the shorter side."""


@dataclass(frozen=True)
class Photos:
    """The files of the two parts; no picture is in both."""

    calibration: tuple[Path, ...]
    test: tuple[Path, ...]


def split(folder: Path = FOLDER) -> Photos:
    """Half of the photos each.

    Raises
    ------
    FileNotFoundError
        If there are fewer than 200; it names the package.
    """
    from PIL import Image

    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        drawn = any(word in part for part in path.relative_to(folder).parts for word in DRAWN)
        if drawn or path.stem.endswith(VARIANTS):
            continue
        with Image.open(path) as image:
            if min(image.size) >= LEAST:
                found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    ordered = sorted(found.values(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    if len(ordered) < 200:
        raise FileNotFoundError(
            f"{folder} has {len(ordered)} photos, and 200 are needed: they are those of Debian's "
            "package tuxpaint-stamps-default; name their folder with --photos"
        )
    return Photos(tuple(ordered[::2]), tuple(ordered[1::2]))


def read(paths: tuple[Path, ...], side: int) -> Tensor:
    """Photos composed on white and squared, in [0, 1]: shape ``(n, 3, side, side)``."""
    from PIL import Image

    rows = []
    for path in paths:
        with Image.open(path) as image:
            cut_out = image.convert("RGBA")
        edge = max(cut_out.size)
        square = Image.new("RGBA", (edge, edge), "white")
        place = ((edge - cut_out.width) // 2, (edge - cut_out.height) // 2)
        square.alpha_composite(cut_out, place)
        small = square.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        rows.append(torch.from_numpy(np.array(small)).movedim(2, 0).float() / 255)
    return torch.stack(rows)
