"""Verification on a second shape: what looks right at the example alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.verifier.second_inputs import extended, other_inputs


def shapes(*args: Any, lengths: tuple[int, ...] = (), **kwargs: Any) -> list[list[list[int]]]:
    return [
        [list(t.shape) for t in (*found.args, *found.kwargs.values())]
        for found in other_inputs(args, kwargs, lengths)
    ]


def test_dims_that_tensors_share_change_together() -> None:
    ids = torch.randint(0, 9, (2, 6))
    found = shapes(ids, mask=ids > 3, square=torch.ones(6, 6), lengths=(20,))
    assert found[0] == [[3, 20], [3, 20], [20, 20]]
    assert [[3, 13], [3, 13], [13, 13]] in found
    assert [[3, 6], [3, 6], [6, 6]] in found
    assert shapes(torch.ones(1, 3, 224, 224))[0] == [[2, 3, 128, 128]]
    assert shapes(torch.ones(2, 3, 8, 12))[0] == [[1, 3, 16, 16]]
    assert shapes(torch.ones(3, 5), torch.arange(3))[0] == [[1, 11], [1]]
    assert shapes(torch.tensor(3.0)) == []
    images = next(iter(other_inputs(([torch.ones(3, 96, 64)] * 2,), {})))
    assert [list(image.shape) for image in images.args[0]] == [[3, 128, 96]]


def test_counting_goes_on_counting() -> None:
    assert extended(torch.arange(4)[None], 1, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert extended(torch.tensor([True, False]), 0, 3).tolist() == [True, False, True]


class Table(nn.Module):
    """A positional table that grows when the input is longer."""

    def __init__(self, how: str, size: int = 10) -> None:
        super().__init__()
        self.how, self.width = how, 16
        self.emb, self.out = nn.Linear(3, 16), nn.Linear(16, 4)
        self.pe: Any
        if how == "buffer":
            self.register_buffer("pe", self.build(size, 16))
        else:
            self.pe = self.build(size, 16)

    @staticmethod
    def build(n: int, width: int) -> Tensor:
        at = torch.arange(n)[:, None] * torch.exp(
            torch.arange(0, width, 2) * -math.log(1e4) / width
        )
        table = torch.zeros(1, n, width)
        table[0, :, 0::2] = torch.sin(at)
        table[0, :, 1::2] = torch.cos(at)[:, : width // 2]
        return table

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        if self.pe.shape[1] < x.shape[1]:
            width = x.shape[-1] if self.how == "shape" else self.width
            self.pe = self.build(x.shape[1], width)
        return self.out((x + self.pe[:, : x.shape[1]]).relu())


@pytest.mark.parametrize("how", ["shape", "attribute", "buffer"])
@pytest.mark.parametrize("size", [10, 30, 3000])
def test_a_table_that_grows_is_never_exact(how: str, size: int) -> None:
    torch.manual_seed(0)
    model, x = Table(how, size).eval(), torch.randn(2, 6, 3)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.4, importance="random")
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "inexact"
    assert f"length {max(size + 1, 13)}" in certificate.reason


def test_a_path_that_one_sample_takes_is_compared() -> None:
    """The size is hidden from the tracer; the second batch shows what it does."""
    torch.manual_seed(0)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            many = h.shape.numel() > 30  # torch.Size can't be followed
            return self.b(h * 2 if many else h)

    model, x = Hidden().eval(), torch.randn(3, 4)
    graph = prunus.trace(model, x)
    plan = prunus.plan(graph, model, ratio=0.5, importance="random")
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "inexact"


def test_the_certificate_says_on_which_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5, importance="random")
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "exact"
    assert certificate.inputs == (
        "given inputs (2×3×12×12), own weights",
        "given inputs (2×3×12×12), randomised weights",
        "resolution 16×16, batch 1: 1×3×16×16",
    )


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x.view(-1, x.shape[1] * 64))


def test_an_image_that_the_model_takes_for_several_is_not_another_resolution() -> None:
    torch.manual_seed(0)
    model, x = Flattens().eval(), torch.randn(2, 3, 8, 8)
    result = prunus.shrink(model, x, ratio=0.5, recover="none")
    assert model.a.out_channels == 4
    assert "answers for 4 samples" in result.certificate.inputs[-1]


def test_a_shape_that_the_model_does_not_take_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4)).eval()
    x = torch.randn(2, 3, 12, 12)
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5, importance="random")
    certificate = prunus.verify(plan, model, x)
    assert certificate.verdict == "exact"
    assert certificate.inputs[2] == "batch 1: 1×3×12×12"
    assert "not compared at resolution" in certificate.inputs[3]
