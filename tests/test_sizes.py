"""Sizes that the forward's code compares, counts by or computes with."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus


class Flat(nn.Module):
    """Flattens by a number of features that it computes anew in one way or another."""

    def __init__(self, size: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.size = size
        self.c1, self.c2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.f1, self.f2 = nn.Linear(8 * 9, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.c2(self.c1(x).relu()).relu(), 2)
        return self.f2(self.f1(x.view(-1, self.size(x))).relu())


FOLLOWED: dict[str, Callable[[Tensor], int]] = {
    "nelement": lambda x: int(x.nelement() / x.shape[0]),
    "numel": lambda x: x.numel() // x.size(0),
    "torch.numel": lambda x: torch.numel(x) // len(x),
    "nbytes": lambda x: x.nbytes // x.element_size() // x.shape[0],
    "np.prod": lambda x: int(np.prod(x.shape[1:])),
    "np.prod of a list": lambda x: np.prod([x.shape[1], x.shape[2], x.shape[3]]),
    "math.prod": lambda x: math.prod(x.shape[1:]),
    "floor": lambda x: math.floor(x.numel() / x.shape[0]),
    "round": lambda x: round(x.numel() / x.shape[0]),
    "one sample": lambda x: x[0].numel(),
    "reduce": lambda x: functools.reduce(operator.mul, x.shape[1:]),
    "shift": lambda x: (x.size(1) << 1) * 9 >> 1,
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_a_number_of_features_that_the_code_computes_follows(how: str) -> None:
    torch.manual_seed(0)
    model, x = Flat(FOLLOWED[how]).eval(), torch.randn(2, 1, 10, 10)
    result = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert model.c2.out_channels == 4, how
    assert result.certificate.verdict == "exact"


class FlatByShape(Flat):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.c2(self.c1(x).relu()).relu(), 2)
        return self.f2(self.f1(x.view(-1, x.shape[1:].numel())).relu())


def test_a_number_of_features_that_the_shape_tells_follows() -> None:
    torch.manual_seed(0)
    model, x = FlatByShape(len).eval(), torch.randn(2, 1, 10, 10)
    result = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert model.c2.out_channels == 4
    assert result.certificate.verdict == "exact"


class Asks(nn.Module):
    """A hidden size that decides on more than shapes."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.ask = ask
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(self.b(h * 2 if self.ask(h) else h).relu())


def _loop(h: Tensor) -> bool:
    found = False
    for _ in range(h.numel() // 100):
        found = True
    return found


PINNED: dict[str, Callable[[Tensor], Any]] = {
    "numel": lambda h: h.numel() > 100,
    "product": lambda h: h.shape[0] * h.shape[1] >= 100,
    "nbytes": lambda h: h.nbytes < 200,
    "int": lambda h: int(h.numel()) > 100,
    "float": lambda h: h.numel() * 1.0 > 100,
    "float()": lambda h: float(h.numel()) > 100,
    "quotient": lambda h: h.numel() / 100 > 1,
    "whole quotient": lambda h: math.sqrt(h.numel() / 4) > 5,
    "floor": lambda h: bool(h.numel() // 100),
    "mask": lambda h: h.shape[1] & 8,
    "len": lambda h: len(h.t()) > 10,
    "max": lambda h: max(h.numel(), 100) > 100,
    "other dim": lambda h: h.shape[1] < h.shape[0],
    "repeat": lambda h: len([0] * h.shape[1]) > 10,
    "np.prod": lambda h: np.prod(h.shape) > 100,
    "np.array": lambda h: np.array(h.shape).prod() > 100,
    "range": _loop,
    "slice": lambda h: h[:, : 3 * len(h)].sum() > 1e9,
    "narrow": lambda h: h.narrow(1, 0, 12).sum() > 1e9,
    "member": lambda h: h.shape[1] in (12, 24),
}


@pytest.mark.parametrize("how", PINNED)
def test_a_size_that_decides_is_pinned_with_its_line(how: str) -> None:
    if how in ("slice", "narrow"):  # the value decides nothing, the positions do
        ask = PINNED[how]
        model = Asks(lambda h: ask(h).isnan())
    else:
        model = Asks(PINNED[how])
    graph = prunus.trace(model.eval(), torch.randn(4, 4), real=how in ("slice", "narrow"))
    pins = graph.why_pinned("a.weight[0]")
    assert any("test_sizes.py" in pin.source for _, pin in pins), pins
    assert not graph.why_pinned("b.weight[0]")


@pytest.mark.parametrize(
    "ask",
    [
        lambda h: h.numel() == 0,
        lambda h: h.shape[1] > 0,
        lambda h: not h.shape[1],
        lambda h: h.shape[1] % h.shape[1],
        lambda h: h.shape[1] > 512,
        lambda h: len(h) > 100,
        lambda h: h[:, : h.shape[1]].isnan().any(),
    ],
)
def test_what_no_removal_can_change_pins_nothing(ask: Any) -> None:
    graph = prunus.trace(Asks(ask).eval(), torch.randn(4, 4), real=True)
    assert not graph.why_pinned("a.weight[0]")


class SkipIfAlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 20, 3, 2, 1)
        self.b = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.c(x).relu()
        if x.shape == y.shape:  # on an image of one pixel, if they have as many channels
            y = y + x
        return self.b(y.mean((2, 3)))


def test_widths_that_differ_stay_different_where_the_code_compares_them() -> None:
    torch.manual_seed(0)
    model, x = SkipIfAlike().eval(), torch.randn(2, 3, 8, 8)
    dense = copy.deepcopy(model)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratios={"a.*": 0.25, "c.*": 0.4}, importance="l2")
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "inexact"
    assert "test_sizes.py" in certificate.reason
    prunus.shrink(model, x, ratios={"a.*": 0.25, "c.*": 0.4}, recover="none")
    assert model.a.out_channels != model.c.out_channels
    assert dense.a.out_channels == 16
