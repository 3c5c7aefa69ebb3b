"""Boxes of YOLOv3-tiny: from its maps to detections, and how far two models agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANCHORS = (((81, 82), (135, 169), (344, 319)), ((10, 14), (23, 27), (37, 58)))
"""Of the coarse and of the fine map, in pixels (Redmon and Farhadi, 2018; yolov3-tiny.cfg)."""

STRIDES = (32, 16)
SURE, OVERLAP, SAME = 0.25, 0.45, 0.5
"""Scores from here on count; boxes that overlap more are one; boxes that do agree."""


@dataclass(frozen=True)
class Found:
    """Detections of one picture: corners of shape ``(n, 4)``, and classes of shape ``(n,)``."""

    corners: Tensor
    classes: Tensor


def detect(maps: Sequence[Tensor]) -> list[Found]:
    """Detections of every picture of a batch."""
    boxes, scores = [], []
    for values, anchors, stride in zip(maps, ANCHORS, STRIDES, strict=True):
        b, _, h, w = values.shape
        cells = values.view(b, 3, -1, h, w).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([columns, rows], -1)
        centre = (cells[..., :2].sigmoid() + grid) * stride
        size = cells[..., 2:4].exp().clamp_max(1e4) * torch.tensor(anchors)[:, None, None]
        boxes.append(torch.cat([centre - size / 2, centre + size / 2], -1).flatten(1, 3))
        scores.append((cells[..., 4:5].sigmoid() * cells[..., 5:].sigmoid()).flatten(1, 3))
    return [
        _suppress(own, score)
        for own, score in zip(torch.cat(boxes, 1), torch.cat(scores, 1), strict=True)
    ]


def _suppress(corners: Tensor, scores: Tensor) -> Found:
    """Of boxes of one class that overlap, the surest."""
    best, classes = scores.max(1)
    order = best.argsort(descending=True, stable=True)
    order = order[best[order] >= SURE]
    kept: list[int] = []
    for index in order.tolist():
        rivals = [k for k in kept if classes[k] == classes[index]]
        if not rivals or overlap(corners[index], corners[rivals]).max() <= OVERLAP:
            kept.append(index)
    return Found(corners[kept], classes[kept])


def overlap(one: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box with others, shape ``(n,)``.

    >>> overlap(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]]))
    tensor([0.3333, 0.0000])
    """
    sides = torch.minimum(one[2:], others[:, 2:]) - torch.maximum(one[:2], others[:, :2])
    common = sides.clamp_min(0).prod(1)
    areas = (one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1)
    return common / (areas - common)


def agreement(dense: Sequence[Found], pruned: Sequence[Found]) -> float:
    """F1 in per cent: boxes of either that the other has as well, of all boxes.

    Two boxes are the same if their classes are and they overlap by half; each counts once.
    """
    both = every = 0
    for a, b in zip(dense, pruned, strict=True):
        every += len(a.classes) + len(b.classes)
        free = list(range(len(b.classes)))
        for corners, kind in zip(a.corners, a.classes, strict=True):
            alike = [n for n in free if b.classes[n] == kind]
            if not alike:
                continue
            shared = overlap(corners, b.corners[alike])
            if shared.max() >= SAME:
                both += 1
                free.remove(alike[int(shared.argmax())])
    return 100.0 * 2 * both / every if every else 100.0
