"""Small seeded models: what the files in ``fixtures/`` were written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block that knows its place."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    """A list of blocks, and a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_layers = 3
        self.blocks = nn.ModuleList(Block(n) for n in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Entry(nn.Module):
    """Traced by a method that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.other = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 5)

    def encode(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.stem(x).relu())


class Settings:
    """What a model is built from."""

    def __init__(self) -> None:
        self.hidden, self.heads, self.name = 8, 2, "settings"


class Configured(nn.Module):
    """Reads its widths from a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).view(-1, self.config.heads, self.config.hidden // self.config.heads)
        return self.down(x.relu()).sum(1)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))),
    "conv": _seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)),
            *(nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )
    ),
    "encoder": _seeded(_encoder),
    "entry": _seeded(Entry),
    "config": _seeded(Configured),
    "blocks": _seeded(Blocks),
    "biasless": _seeded(
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    ),
}


def sample(name: str) -> Any:
    """An example input of a model, always the same."""
    shapes = {"conv": (2, 3, 8, 8), "encoder": (2, 5, 8)}
    return torch.randn(shapes.get(name, (5, 6)), generator=torch.Generator().manual_seed(1))
