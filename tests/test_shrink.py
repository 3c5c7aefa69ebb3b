"""``prunus.shrink``: all or nothing, and what the proof rejects stays whole."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus

HIDDEN = 16


class Comparing(nn.Module):
    """Its forward takes another path when the width of ``second`` changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.second = nn.Linear(24, HIDDEN)
        self.third = nn.Linear(HIDDEN, 24)
        self.last = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        if operator.index(x.size(-1)) != HIDDEN:  # a comparison of sizes would pin it
            x = -x
        return self.last(F.relu(self.third(x)))


class Asserting(Comparing):
    """Its forward refuses another width."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        assert operator.index(x.size(-1)) == HIDDEN, "unexpected width"
        return self.last(F.relu(self.third(x)))


class Constant(nn.Module):
    """Heads × dims written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 12 * 64)
        self.proj = nn.Linear(12 * 64, 32)
        self.up = nn.Linear(32, 512)
        self.down = nn.Linear(512, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], 12, 64)
        x = x + self.proj(heads.sigmoid().flatten(1))
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x)


@pytest.mark.parametrize(("build", "said"), [(Comparing, "differ"), (Asserting, "unexpected")])
def test_a_group_that_the_code_does_not_follow_stays_whole(build, said) -> None:
    model = build().eval()
    x = torch.randn(3, 8)
    done = prunus.shrink(model, x, budget=prunus.Budget(params=0.7), importance="random")
    assert list(done.held) == ["second.weight[0]"]
    assert said in done.held["second.weight[0]"]
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"
    assert model.second.out_features == HIDDEN
    assert model.first.out_features < 24
    assert prunus.report.measure_costs(model, x)["params"] <= 0.7 * done.graph.cost("params")


def test_the_failing_line_is_named() -> None:
    model = Asserting().eval()
    done = prunus.shrink(model, torch.randn(3, 8), budget=prunus.Budget(params=0.7))
    assert "test_shrink.py:" in done.held["second.weight[0]"]


def test_a_constant_in_the_forward_pins_its_group_and_the_budget_is_met_elsewhere() -> None:
    model = Constant().eval()
    x = torch.randn(2, 32)
    graph = prunus.trace(model, x)
    reasons = [str(pin) for _, pin in graph.why_pinned("qkv.weight[0]")]
    assert any("code fixes this size" in r and "test_shrink.py:" in r for r in reasons)
    done = prunus.shrink(model, x, budget=prunus.Budget(params=0.7))
    assert not done.held
    assert done.certificate is not None
    assert done.certificate.verdict == "exact"
    assert model.qkv.out_features == 12 * 64
    assert prunus.report.measure_costs(model, x)["params"] <= 0.7 * graph.cost("params")


def test_a_budget_that_the_rest_cannot_meet_is_reported() -> None:
    model = Constant().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(prunus.PrunusError, match="reach"):
        prunus.shrink(model, torch.randn(2, 32), budget=prunus.Budget(params=0.02))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("data", "said"),
    [([], "empty"), (iter(()), "empty"), ([torch.full((2, 3, 8, 8), float("nan"))], "NaN")],
)
def test_bad_calibration_data_leaves_the_model_alone(data, said) -> None:
    model = Normed().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(prunus.PrunusError, match=said):
        prunus.shrink(model, torch.randn(2, 3, 8, 8), budget=prunus.Budget(macs=0.5), data=data)
    assert model.conv.out_channels == 16
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_options_of_a_budget_are_refused_with_a_ratio() -> None:
    graph = prunus.trace(model := Normed().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(prunus.PrunusError, match=r"scope can't be combined"):
        prunus.plan(graph, model, ratio=0.3, scope="global")
    with pytest.raises(prunus.PrunusError, match="how much to remove"):
        prunus.plan(graph, model)
