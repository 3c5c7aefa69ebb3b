"""Attacks on plans and saved models, and an instrument that sees what an attack reached.

An attack is one changed plan or file.  It is held where nothing but Prunus' own errors comes out,
a model for which it was refused is as it was, and nothing outside the model has changed.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.graph.plans import Plan
from tests.format_models import MODELS


class Tempting(nn.Module):
    """Holds what a stranger would like to reach: classes, a logger, a method that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self._norm_layer, self.norm_layer = nn.BatchNorm2d, nn.BatchNorm2d
        self.log = logging.getLogger("tempting")
        self.config = SimpleNamespace(width=8, layer_types=["x", "y", "x"], kind=nn.BatchNorm2d)
        self.sizes, self.size = (8, 8), 8
        self.table = torch.arange(8.0)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.a(x).relu()) + self.table
        return self.b(x.relu().view(-1, self.config.width)) * self.scale

    def export(self, path: str, text: str = "text") -> None:
        """As ``save_pretrained`` does."""
        Path(path).write_text(text)


def _tempting() -> nn.Module:
    torch.manual_seed(0)
    return Tempting().eval()


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "tempting": _tempting,
    **{name: MODELS[name] for name in ("mlp", "conv", "blocks", "encoder")},
}
SHAPES = {"conv": (2, 3, 8, 8), "encoder": (2, 5, 8)}


def inputs_of(name: str) -> Tensor:
    """An example input, always the same."""
    return torch.randn(SHAPES.get(name, (5, 6)), generator=torch.Generator().manual_seed(1))


@dataclass
class Tally:
    """How many attacks were tried and held; of the others what happened."""

    tried: int = 0
    held: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def add(self, problem: str, what: str) -> None:
        """Note one attack; an empty problem is a held one."""
        self.tried += 1
        self.held += not problem
        if problem:
            self.broken.append(f"{problem}: {what[:400]}")


class Observer:
    """Records what a process does while it watches: files, programs, sockets, unpickling."""

    _WRITES = (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.link",
        "os.symlink",
    )
    _PREFIXES = (
        "subprocess.",
        "socket.",
        "shutil.",
        "os.system",
        "os.exec",
        "os.spawn",
        "os.fork",
        "os.putenv",
        "os.unsetenv",
        "os.truncate",
        "pickle.",
        "ctypes.dlopen",
        "tempfile.",
    )

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Any) -> None:
        if not self._watching:
            return
        if event == "open":
            mode, flags = args[1], args[2]
            writes = bool(set(str(mode or "")) & set("wax+")) or bool(
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes:
                self.seen.append(f"open {args[0]}")
        elif event in self._WRITES or event.startswith(self._PREFIXES):
            self.seen.append(f"{event} {args}"[:200])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context events count."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False


def outside() -> dict[str, Any]:
    """What is not an attack's to change: classes, loggers, the environment, PyTorch's switches."""
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type)]
    kinds += [Tempting, Tensor, nn.Parameter, Plan, SimpleNamespace, logging.Logger]
    root = logging.getLogger()
    return {
        "classes": [
            {n: _kept(v) for n, v in vars(kind).items() if n not in _CACHES} for kind in kinds
        ],
        "logging": (root.manager.disable, root.level, logging.getLogger("tempting").level),
        "environment": dict(os.environ),
        "switches": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.mha.get_fastpath_enabled(),
            torch._C._get_mkldnn_enabled(),
            torch._C._get_cudnn_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "interpreter": (sys.getrecursionlimit(), len(sys.path), os.getcwd()),
    }


_CACHES = {
    "__abstractmethods__",
    "_abc_impl",
    "__annotations__",
    "__doc__",
    "__weakref__",
    "__dict__",
}


def _kept(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


NAMES = (
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "__class__",
    "__dict__",
    "weight",
    "bias",
    "weight.data",
    "weight.requires_grad",
    "weight.grad",
    "_norm_layer._version",
    "norm_layer._version",
    "norm_layer.dump_patches",
    "log.level",
    "log.manager.disable",
    "log.root.level",
    "forward.__globals__",
    "forward",
    "export",
    "config.width",
    "config.kind._version",
    "config.__class__",
    "config.layer_types",
    "config.layer_types[1]",
    "sizes",
    "sizes[0]",
    "sizes[9]",
    "size",
    "table",
    "scale",
    "in_features",
    "out_features",
    "num_layers",
    "layer_idx",
    "use_nested_tensor",
    "num_heads",
    "groups",
    "",
)
"""Attributes that a stranger may name."""

WORDS: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    3,
    8,
    1 << 70,
    1e300,
    -0.5,
    "",
    "x",
    "a.weight",
    [],
    [[0, 1]],
    {},
    {"a": 1},
    [["prunus.SlimMultiheadAttention", 0.5]],
)


def scramble(document: Any, dice: random.Random) -> None:
    """Replace, remove or copy one value somewhere in a JSON document, in place."""
    holder, places = document, [document]
    while dice.random() < 0.8 and places:
        holder = dice.choice(places)
        values = holder.values() if isinstance(holder, dict) else holder
        places = [value for value in values if isinstance(value, (dict, list)) and value]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key, action = dice.choice(keys), dice.randrange(3)
    if action == 0:
        holder[key] = copy.deepcopy(dice.choice(WORDS))
    elif action == 1:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(holder[dice.choice(keys)])
