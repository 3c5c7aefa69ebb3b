"""MobileNetV2: inverted residuals with linear bottlenecks.

The names are torchvision's (``features.N.conv...``, ``classifier.1``), so that an ImageNet
checkpoint of that format loads strictly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# expansion, channels, repeats, stride of the first
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor``, never losing more than a tenth.

    >>> make_divisible(32 * 0.35), make_divisible(33)
    (16, 32)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class ConvBNReLU(nn.Sequential):
    """Convolution, batch norm and ReLU6: [B, inputs, H, W] -> [B, outputs, H/stride, W/stride]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_shortcut = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvBNReLU(inputs, hidden, kernel=1))
        layers += [
            ConvBNReLU(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.use_shortcut else out


class MobileNetV2(nn.Module):
    """Stride 32 in all: [B, 3, H, W] -> [B, classes]."""

    def __init__(self, num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        channels = make_divisible(32 * width)
        last = make_divisible(1280 * max(1.0, width))
        features: list[nn.Module] = [ConvBNReLU(3, channels, stride=2)]
        for expansion, base, repeats, stride in STAGES:
            outputs = make_divisible(base * width)
            for index in range(repeats):
                first_stride = stride if index == 0 else 1
                features.append(InvertedResidual(channels, outputs, first_stride, expansion))
                channels = outputs
        features.append(ConvBNReLU(channels, last, kernel=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        out: Tensor = self.classifier(x)
        return out


def mobilenetv2(num_classes: int = 1000, width: float = 1.0, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 with a width multiplier."""
    return MobileNetV2(num_classes, width, dropout)
