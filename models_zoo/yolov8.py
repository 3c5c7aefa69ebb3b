"""A detector in the style of YOLOv8: C2f backbone, FPN and PAN neck, decoupled head.

The head's raw maps are returned; decoding the box distributions and removing duplicates are left
to whoever needs boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, batch norm, SiLU: [B, inputs, H, W] -> [B, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions of the same width, with an optional shortcut."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 3)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C2f(nn.Module):
    """Split in halves, chain bottlenecks on the second, join every intermediate result."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool = False) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Conv(inputs, 2 * hidden)
        self.cv2 = Conv((2 + depth) * hidden, outputs)
        self.m = nn.ModuleList(Bottleneck(hidden, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class SPPF(nn.Module):
    """Three 5x5 max pools in a row, joined with their input: windows of 5, 9 and 13."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, hidden)
        self.cv2 = Conv(4 * hidden, channels)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class Head(nn.Module):
    """For each level a box branch and a class branch: [B, 4 reg_max + classes, H, W]."""

    def __init__(self, channels: Sequence[int], num_classes: int, reg_max: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.reg_max = reg_max
        box = max(16, channels[0] // 4, 4 * reg_max)
        category = max(channels[0], min(num_classes, 100))
        self.box = nn.ModuleList(self._branch(c, box, 4 * reg_max) for c in channels)
        self.category = nn.ModuleList(self._branch(c, category, num_classes) for c in channels)

    @staticmethod
    def _branch(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            Conv(inputs, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, outputs, 1)
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [
            torch.cat((box(x), category(x)), 1)
            for box, category, x in zip(self.box, self.category, levels, strict=True)
        ]


class YOLOv8(nn.Module):
    """[B, 3, H, W] -> maps [B, 4 reg_max + classes, H/s, W/s] at s = 8, 16, 32.

    ``widths`` are the channels at strides 2 to 32, ``depths`` the bottlenecks in the C2f of
    strides 4 to 32; the neck's have ``depths[0]``. H and W must be multiples of 32.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 80,
        reg_max: int = 16,
    ) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = widths
        neck = depths[0]
        self.stem = Conv(3, w1, 3, stride=2)
        self.down2 = Conv(w1, w2, 3, stride=2)
        self.stage2 = C2f(w2, w2, depths[0], shortcut=True)
        self.down3 = Conv(w2, w3, 3, stride=2)
        self.stage3 = C2f(w3, w3, depths[1], shortcut=True)
        self.down4 = Conv(w3, w4, 3, stride=2)
        self.stage4 = C2f(w4, w4, depths[2], shortcut=True)
        self.down5 = Conv(w4, w5, 3, stride=2)
        self.stage5 = C2f(w5, w5, depths[3], shortcut=True)
        self.sppf = SPPF(w5)

        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.top_down4 = C2f(w5 + w4, w4, neck)
        self.top_down3 = C2f(w4 + w3, w3, neck)
        self.shrink3 = Conv(w3, w3, 3, stride=2)
        self.bottom_up4 = C2f(w3 + w4, w4, neck)
        self.shrink4 = Conv(w4, w4, 3, stride=2)
        self.bottom_up5 = C2f(w4 + w5, w5, neck)
        self.head = Head((w3, w4, w5), num_classes, reg_max)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stage2(self.down2(self.stem(x)))
        level3 = self.stage3(self.down3(x))
        level4 = self.stage4(self.down4(level3))
        level5 = self.sppf(self.stage5(self.down5(level4)))

        inner4 = self.top_down4(torch.cat((self.upsample(level5), level4), 1))
        out3 = self.top_down3(torch.cat((self.upsample(inner4), level3), 1))
        out4 = self.bottom_up4(torch.cat((self.shrink3(out3), inner4), 1))
        out5 = self.bottom_up5(torch.cat((self.shrink4(out4), level5), 1))
        maps: list[Tensor] = self.head([out3, out4, out5])
        return maps


def yolov8n(num_classes: int = 80, reg_max: int = 16) -> YOLOv8:
    """The smallest size: a quarter of the full width, a third of the depth."""
    return YOLOv8((16, 32, 64, 128, 256), (1, 2, 2, 1), num_classes, reg_max)
