"""HRNet: branches at several resolutions that run in parallel and exchange after every module.

Branch ``i`` works at stride ``4 * 2**i`` with ``width * 2**i`` channels. An exchange gives every
branch the sum of all of them, brought to its resolution: strided 3x3 convolutions downwards, a
1x1 convolution and nearest upsampling upwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_zoo.resnet import BasicBlock, Bottleneck, initialise, stage

STEM_WIDTH = 64


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its batch norm, without an activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def downsampler(inputs: int, outputs: int, steps: int) -> nn.Sequential:
    """Return ``steps`` strided convolutions; only the last changes the width and ends linear."""
    layers: list[nn.Module] = []
    for _ in range(steps - 1):
        layers += [conv_bn(inputs, inputs, 3, stride=2), nn.ReLU(inplace=True)]
    layers.append(conv_bn(inputs, outputs, 3, stride=2))
    return nn.Sequential(*layers)


class Exchange(nn.Module):
    """Full fusion of n branches: n maps in, n maps of the same shapes out."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.ModuleList(self._path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    @staticmethod
    def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source < target:
            return downsampler(widths[source], widths[target], target - source)
        return nn.Sequential(
            conv_bn(widths[source], widths[target], 1),
            nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"),
        )

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        fused = []
        for paths in self.paths:
            assert isinstance(paths, nn.ModuleList)
            total = paths[0](branches[0])
            for path, branch in zip(paths[1:], branches[1:], strict=True):
                total = total + path(branch)
            fused.append(F.relu(total))
        return fused


class HRModule(nn.Module):
    """Basic blocks on every branch, then one exchange."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            stage(BasicBlock, width, width, blocks, stride=1) for width in widths
        )
        self.exchange = Exchange(widths)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        branches = [run(x) for run, x in zip(self.branches, branches, strict=True)]
        fused: list[Tensor] = self.exchange(branches)
        return fused


class Transition(nn.Module):
    """Adapt the widths of the branches there are, and open one at twice the stride."""

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        self.keep = nn.ModuleList(
            nn.Identity()
            if old == new
            else nn.Sequential(conv_bn(old, new, 3), nn.ReLU(inplace=True))
            for old, new in zip(before, after[:-1], strict=True)
        )
        self.open = nn.Sequential(
            conv_bn(before[-1], after[-1], 3, stride=2), nn.ReLU(inplace=True)
        )

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        kept = [adapt(x) for adapt, x in zip(self.keep, branches, strict=True)]
        return [*kept, self.open(branches[-1])]


class HRNet(nn.Module):
    """Four resolutions at strides 4 to 32: [B, 3, H, W] -> [B, classes]; H, W multiples of 32.

    ``modules`` counts the exchanges of stages 2, 3 and 4, ``blocks`` the basic blocks between two
    of them, ``stem_blocks`` the bottlenecks of stage 1.
    """

    def __init__(
        self,
        width: int = 18,
        num_classes: int = 1000,
        stem_blocks: int = 4,
        modules: Sequence[int] = (1, 4, 3),
        blocks: int = 4,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.conv2 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(STEM_WIDTH)
        self.stage1 = stage(Bottleneck, STEM_WIDTH, STEM_WIDTH, stem_blocks, stride=1)

        widths = [STEM_WIDTH * Bottleneck.expansion]
        self.transitions = nn.ModuleList()
        self.stages = nn.ModuleList()
        for branches, count in zip((2, 3, 4), modules, strict=True):
            wider = [width * 2**index for index in range(branches)]
            self.transitions.append(Transition(widths, wider))
            self.stages.append(nn.Sequential(*(HRModule(wider, blocks) for _ in range(count))))
            widths = wider

        joined = sum(widths)
        self.head = nn.Sequential(conv_bn(joined, joined, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(joined, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        branches = [self.stage1(x)]
        for transition, run in zip(self.transitions, self.stages, strict=True):
            branches = run(transition(branches))
        size = branches[0].shape[-2:]
        upsampled = [
            F.interpolate(branch, size=size, mode="bilinear", align_corners=False)
            for branch in branches[1:]
        ]
        joined = self.head(torch.cat([branches[0], *upsampled], dim=1))
        out: Tensor = self.classifier(F.adaptive_avg_pool2d(joined, 1).flatten(1))
        return out


def hrnet_w18(num_classes: int = 1000, width: int = 18) -> HRNet:
    """HRNet-W18: 4 bottlenecks, then 1, 4 and 3 modules of 4 blocks on each branch."""
    return HRNet(width, num_classes)


def hrnet_w18_small(num_classes: int = 1000, width: int = 18) -> HRNet:
    """All the kinds of layers of HRNet-W18, once each: one module per stage, 2 blocks, 1 stem."""
    return HRNet(width, num_classes, stem_blocks=1, modules=(1, 1, 1), blocks=2)
