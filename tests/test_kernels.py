"""What kernels demand beyond shapes: widths in multiples, layouts that they trust."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.graph.axis import kept_positions
from prunus.graph.budget import Budget
from prunus.graph.groups import Aligned
from tests.faults import Net
from tests.pipeline import judge


class Experts(nn.Module):
    """Gated experts whose products run grouped, tokens sorted by expert."""

    def __init__(self, count: int = 3, width: int = 20, inner: int = 28) -> None:
        super().__init__()
        self.count = count
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, 2 * inner, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, width, inner) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort()
        ends = torch.histc(chosen.float(), self.count, 0, self.count - 1).cumsum(0).int()
        gate, value = F.grouped_mm(x[order], self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * value, self.down.transpose(1, 2), offs=ends)
        return x + out[order.argsort()] * weight[:, None]


def mixture() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.last(m.experts(m.first(x)))
        return out

    return Net(run, first=nn.Linear(8, 20), experts=Experts(), last=nn.Linear(20, 3))


TOKENS = torch.randn(16, 8)


def test_experts_are_exact_and_lose_multiples() -> None:
    judged = judge(mixture, TOKENS)
    assert judged.caught_by == "", judged
    model = mixture().eval()
    graph = prunus.trace(model, TOKENS)
    assert {group.name: group.size for group in graph.groups} == {
        "first.weight[0]": 20, "experts.up[0]": 3, "experts.up[1]": 28
    }  # fmt: skip
    aligned = [c for c in graph.constraints if isinstance(c, Aligned)]
    assert {c.multiple for c in aligned} == {4}


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_budget_keeps_to_the_multiples(share: float, scope: Any) -> None:
    model = mixture().eval()
    graph = prunus.trace(model, TOKENS)
    plan = prunus.plan(graph, model, budget=Budget(params=share), scope=scope)
    assert plan.costs["params"][1] <= share * plan.costs["params"][0]
    prunus.apply(plan, model)
    assert model.experts.up.shape[2] % 4 == model.experts.down.shape[2] % 4 == 0
    assert model(TOKENS).shape == (16, 3)


def test_multiples_of_a_kernel_and_of_the_user_hold_together() -> None:
    model = mixture().eval()
    graph = prunus.trace(model, TOKENS)
    plan = prunus.plan(graph, model, budget=Budget(params=0.7), round_to=6)
    for axis, stay in plan.keep.items():
        if axis.tensor in ("experts.up", "experts.down") and axis.dim == 2:
            assert len(stay) % 12 == 0


@pytest.mark.parametrize("ratio", [0.2, 0.33, 0.9])
def test_a_ratio_keeps_to_the_multiples(ratio: float) -> None:
    model = mixture().eval()
    graph = prunus.trace(model, TOKENS)
    plan = prunus.plan(graph, model, ratio=ratio, importance="random")
    kept = graph.mask_from_positions({axis: np.asarray(stay) for axis, stay in plan.keep.items()})
    for one in graph.constraints:
        if isinstance(one, Aligned):
            assert len(kept_positions(one.label, kept)) % one.multiple == 0


def test_a_ratio_less_than_any_multiple_is_refused_with_the_kernel() -> None:
    model = mixture().eval()
    with pytest.raises(prunus.PrunusError, match=r"0.05 removes nothing[^$]*multiples of 4"):
        prunus.plan(
            prunus.trace(model, TOKENS),
            model,
            ratio=0.05,
            importance="random",
            exclude=["experts.up[[]0]"],
        )


class Odd(nn.Module):
    """Experts as wide as no multiple, which this kernel takes for the last dim."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.up = nn.Parameter(torch.randn(2, 14, 12))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([8, 16], dtype=torch.int32)
        out: Tensor = F.grouped_mm(self.first(x), self.up.transpose(1, 2), offs=ends)
        return out.relu().sum(1)


def test_a_width_that_is_no_multiple_even_whole_stays() -> None:
    model = Odd().eval()
    graph = prunus.trace(model, TOKENS)
    with pytest.raises(prunus.PrunusError, match=r"removes nothing[^$]*multiples of 4"):
        prunus.plan(graph, model, ratio=0.1, importance="random")
    plan = prunus.plan(graph, model, ratio=0.4, importance="random")
    assert prunus.verify(plan, model, TOKENS).verdict == "exact"


class ChannelsLast(nn.Module):
    """A norm between convolutions in channels-last, and attention that reads what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 1)
        self.norm = nn.GroupNorm(1, 24)
        self.qkv = nn.Conv2d(24, 3 * 24, 1)
        self.last = nn.Conv2d(24, 4, 1)
        self.heads, self.size = 3, 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.contiguous(memory_format=torch.channels_last)))
        n, _, h, w = x.shape
        q, k, v = (
            self.qkv(x).reshape(n, self.heads, 3 * self.size, h * w).transpose(2, 3).chunk(3, 3)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        answer: Tensor = self.last(out.reshape(n, self.heads * self.size, h, w)).mean((2, 3))
        return answer


def test_the_replay_trusts_no_layout() -> None:
    image = torch.randn(2, 3, 4, 4)
    judged = judge(ChannelsLast, image)
    assert judged.caught_by == "", judged
    torch.manual_seed(0)
    model = ChannelsLast().eval()
    plan = prunus.plan(prunus.trace(model, image), model, ratio=0.3, importance="random")
    with torch.no_grad(), prunus.mask(plan, model):
        masked = model(image)
    prunus.apply(plan, model)
    torch.testing.assert_close(model(image), masked, atol=1e-5, rtol=1e-4)


class Overflowing(nn.Module):
    """Adds a mask that is 0 · ∞ in float64 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        seen = (1.0 - torch.ones(x.shape[0], 1)) * torch.finfo(x.dtype).min
        out: Tensor = self.last(x + seen)
        return out


def test_a_model_that_overflows_in_float64_is_judged_in_its_own_type() -> None:
    judged = judge(Overflowing, TOKENS)
    assert judged.caught_by == "", judged


class DeadOutput(nn.Module):
    """Ends in a ReLU that nothing gets through at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.last.weight.abs_().neg_()
            self.last.bias.fill_(-0.01)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu()).relu()
        return out


def test_a_dead_output_is_woken() -> None:
    judged = judge(DeadOutput, TOKENS)
    assert judged.caught_by == "", judged
