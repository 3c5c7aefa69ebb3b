"""YOLOv3-tiny: a plain convolutional backbone and two detection heads.

Convolutions and batch norms are kept apart, and the modules are registered in the order of
darknet's configuration file, so that a ``.weights`` file can be read in ``modules()`` order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, batch norm, leaky ReLU: [B, inputs, H, W] -> [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), 0.1)


class YOLOv3Tiny(nn.Module):
    """[B, 3, H, W] -> maps [B, anchors (5 + classes), H/s, W/s] at s = 32, 16.

    H and W must be multiples of 32. The last pool has stride 1; its input is padded at the right
    and at the bottom by values that are never the maximum.
    """

    def __init__(self, num_classes: int = 80, anchors: int = 3) -> None:
        super().__init__()
        outputs = anchors * (5 + num_classes)
        self.conv1 = Conv(3, 16)
        self.conv2 = Conv(16, 32)
        self.conv3 = Conv(32, 64)
        self.conv4 = Conv(64, 128)
        self.conv5 = Conv(128, 256)
        self.conv6 = Conv(256, 512)
        self.conv7 = Conv(512, 1024)
        self.neck = Conv(1024, 256, kernel=1)
        self.coarse = Conv(256, 512)
        self.coarse_head = nn.Conv2d(512, outputs, 1)
        self.lateral = Conv(256, 128, kernel=1)
        self.fine = Conv(128 + 256, 256)
        self.fine_head = nn.Conv2d(256, outputs, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.max_pool2d(self.conv3(x), 2)
        x = F.max_pool2d(self.conv4(x), 2)
        route = self.conv5(x)
        x = self.conv6(F.max_pool2d(route, 2))
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, stride=1)
        x = self.neck(self.conv7(x))
        coarse = self.coarse_head(self.coarse(x))
        up = F.interpolate(self.lateral(x), scale_factor=2.0, mode="nearest")
        fine = self.fine_head(self.fine(torch.cat((up, route), 1)))
        return [coarse, fine]


def yolov3_tiny(num_classes: int = 80, anchors: int = 3) -> YOLOv3Tiny:
    """YOLOv3-tiny; 255 outputs per place for COCO's 80 classes."""
    return YOLOv3Tiny(num_classes, anchors)
