"""Models prepared for quantization-aware training: observers and grids follow their channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import prunus

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, Any] = {
    "fused, each channel": quantization.get_default_qat_qconfig("fbgemm"),
    "fused, one grid": quantization.get_default_qat_qconfig("qnnpack"),
    "each channel": quantization.QConfig(
        activation=quantization.default_fake_quant,
        weight=quantization.default_per_channel_weight_fake_quant,
    ),
    "one grid": quantization.QConfig(
        activation=quantization.default_fake_quant,
        weight=quantization.default_weight_fake_quant,
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(config: Any, *, run: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).train()  # fmt: skip
    model.qconfig = config
    fused = quantization.fuse_modules_qat(model, [["0", "1", "2"], ["3", "4"]])
    model = quantization.prepare_qat(fused)
    for _ in range(3 if run else 0):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_observers_follow_their_channels(name: str) -> None:
    model = prepared(CONFIGS[name])
    plan = prunus.plan(prunus.trace(model, IMAGES), model, ratio=0.5)
    before = state_of(model)
    certificate = prunus.verify(plan, model, IMAGES)
    assert (certificate.verdict, certificate.reason) == ("exact", "")
    after = state_of(model)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    count = sum(parameter.numel() for parameter in model.parameters())
    prunus.apply(plan, model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.6 * count
    if "each channel" in name:
        assert model[0].weight_fake_quant.scale.shape == (6,)
    smaller = copy.deepcopy(model).train()
    smaller(IMAGES).square().mean().backward()
    assert smaller[0].weight.grad.shape == model[0].weight.shape


def test_a_scale_of_other_channels_is_noticed() -> None:
    """The outcome of rounding is handed over only where what goes in is the same."""
    model = prepared(CONFIGS["fused, each channel"])
    plan = prunus.plan(prunus.trace(model, IMAGES), model, ratio=0.5)
    axis = next(a for a in plan.keep if a.tensor.endswith("0.weight_fake_quant.scale"))
    other = {**plan.keep, axis: tuple(11 - place for place in plan.keep[axis])[::-1]}
    certificate = prunus.verify(prunus.Plan(**{**vars(plan), "keep": other}), model, IMAGES)
    assert certificate.verdict == "inexact"


def test_observers_that_have_seen_nothing_are_named() -> None:
    model = prepared(CONFIGS["fused, each channel"], run=False)
    graph = prunus.trace(model, IMAGES)
    reasons = [pin.reason for _, pin in graph.why_pinned("0.weight")]
    assert any("prune before prepare_qat" in reason for reason in reasons), reasons
