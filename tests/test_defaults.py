"""What is done where nobody says otherwise: widths in multiples of 8, and a floor of 0.2."""

import json

import pytest
import torch
from torch import Tensor, nn

import models_zoo
import prunus
from prunus import Budget
from prunus.cli import main
from prunus.errors import BudgetError


def spare(plan: prunus.Plan, graph: prunus.CouplingGraph, budget: Budget) -> float:
    """Room under the tightest bound, as a part of the dense cost."""
    return min(
        (most - plan.costs[name][1]) / plan.costs[name][0]
        for name, most in budget.limits(graph).items()
    )


class Wide(nn.Module):
    """Convolutions of several widths, two of them side by side and beside the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 44, 3, padding=1)
        self.c, self.d = nn.Conv2d(96, 24, 1), nn.Conv2d(44 + 24 + 3, 128, 3, padding=1)
        self.e = nn.Conv2d(128, 128, 3, padding=1, groups=4)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = torch.cat([self.b(y), self.c(y), x], dim=1).relu()
        return self.head(self.e(self.d(y).relu()).relu().mean((2, 3)))


class Glu(nn.Module):
    """One projection makes the gates and the values of an FFN, one of 96 units."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(32, 192), nn.Linear(96, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(self.norm(x)).chunk(2, dim=-1)
        return self.head(x + self.down(gate.sigmoid() * value))


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, prunus.CouplingGraph]:
    torch.manual_seed(0)
    model = Wide().eval()
    return model, prunus.trace(model, torch.randn(1, 3, 16, 16))


BUDGETS = [
    Budget(macs=0.5), Budget(macs=0.8), Budget(params=0.4), Budget(params=0.6, macs=0.5),
    Budget(bytes=0.5), Budget(activation=0.8),
]  # fmt: skip


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_wide_widths_are_multiples_and_the_bound_is_met_within_a_step(wide, budget, scope) -> None:
    model, graph = wide
    plan = prunus.plan(graph, model, budget=budget, scope=scope)
    exact = prunus.plan(graph, model, budget=budget, scope=scope, round_to=1)
    # Whole blocks of a grouped convolution may be too coarse by themselves.
    assert 0 <= spare(plan, graph, budget) <= max(0.02, spare(exact, graph, budget))
    assert "round_to" in plan.origin["automatic"]
    told = plan.origin["round_to"]
    each = dict(told) if not isinstance(told, int) else {"*": told}
    for axis, stay in plan.keep.items():
        groups = [g.name for g in graph.groups if axis in dict(g.axes)]
        if axis.tensor.endswith("weight") and axis.dim == 0 and plan.shapes[axis.tensor][0] >= 32:
            multiple = min(each.get(name, each["*"]) for name in groups)
            assert len(stay) % multiple == 0, (axis, len(stay), multiple)
    assert prunus.verify(plan, model, torch.randn(2, 3, 16, 16)).verdict == "exact"


def test_multiples_of_8_where_steps_are_small() -> None:
    model = models_zoo.build("resnet_fmnist")
    graph = prunus.trace(model, models_zoo.example_inputs("resnet_fmnist"))
    plan = prunus.plan(graph, model, budget=Budget(macs=0.5))
    assert plan.origin["round_to"] == 8
    kept = {choice.name: choice.size - len(choice.removed) for choice in plan.groups}
    assert all(kept[choice.name] % 8 == 0 for choice in plan.groups if choice.size >= 32)
    assert any(kept[choice.name] % 8 for choice in plan.groups if choice.size < 32)  # left alone
    exact = prunus.plan(graph, model, budget=Budget(macs=0.5), round_to=1)
    assert spare(exact, graph, Budget(macs=0.5)) <= 0.01
    assert "automatic" not in exact.origin
    assert exact.origin["round_to"] == 1


def test_packed_widths_are_multiples_on_both_sides() -> None:
    model = Glu().eval()
    graph = prunus.trace(model, torch.randn(3, 32))
    plan = prunus.plan(graph, model, budget=Budget(params=0.55), include="both.*")
    shapes = plan.resulting_shapes()
    assert shapes["both.weight"][0] == 2 * shapes["down.weight"][1]
    told = plan.origin["round_to"]
    assert shapes["down.weight"][1] % (told if isinstance(told, int) else 4) == 0
    assert told != 1


def test_heads_blocks_and_ratios_are_not_rounded() -> None:
    layer = nn.TransformerEncoderLayer(48, 6, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    graph = prunus.trace(model, torch.randn(1, 5, 48))
    kinds = {one.group: one.kind for one in prunus.structures.find_structures(graph).structures}
    plan = prunus.plan(graph, model, budget=Budget(macs=0.7))
    for choice in plan.groups:
        kept = choice.size - len(choice.removed)
        assert kinds[choice.name] != "ffn" or kept % 4 == 0
        assert kinds[choice.name] == "ffn" or kept < 48
    ffn = next(name for name, kind in kinds.items() if kind == "ffn")
    said = prunus.plan(graph, model, budget=Budget(macs=0.8), ratios={ffn: 0.3})
    assert next(len(c.removed) for c in said.groups if c.name == ffn) == round(0.3 * 128)
    alone = prunus.plan(graph, model, ratios={ffn: 0.3})
    assert alone.origin["round_to"] == 1
    assert prunus.plan(graph, model, ratio=0.3).origin["round_to"] == 1


def test_a_step_that_is_too_coarse_is_made_finer() -> None:
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    graph = prunus.trace(model, torch.randn(1, 8))
    for share in (0.93, 0.71, 0.5, 0.29, 0.04):
        plan = prunus.plan(graph, model, budget=Budget(macs=share))
        coarsest = plan.origin["round_to"]
        assert isinstance(coarsest, int)
        kept = 40 - len(plan.groups[0].removed)
        assert kept % coarsest == 0
        assert kept == int(share * 40 // coarsest * coarsest)
        assert coarsest == 8 or share * 40 // 8 * 8 < (share - 0.02) * 40


def test_what_was_asked_is_not_rounded_again() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    graph = prunus.trace(model, torch.randn(1, 8))
    plan = prunus.plan(graph, model, budget=Budget(macs=0.6), round_to=6)
    assert (64 - len(plan.groups[0].removed)) % 6 == 0
    assert "automatic" not in plan.origin


class Tower(nn.Module):
    """Two layers of which the first is worth next to nothing by its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 40), nn.Linear(40, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def lost(plan: prunus.Plan) -> dict[str, float]:
    return {choice.name: len(choice.removed) / choice.size for choice in plan.groups}


def worthless(group, context):
    """Scores that let all of the first group go first."""
    return torch.full((group.size,), 1e-6 if group.name.startswith("a.") else 1.0).numpy()


def test_the_global_scope_leaves_a_fifth_of_every_group() -> None:
    model = Tower().eval()
    graph = prunus.trace(model, torch.randn(1, 8))
    options = {"budget": Budget(macs=0.2), "importance": worthless, "normalise": "none",
               "round_to": 1}  # fmt: skip
    kept = prunus.plan(graph, model, scope="global", **options)
    assert max(lost(kept).values()) <= 0.8
    assert "max_ratio" in kept.origin["automatic"]
    assert kept.origin["max_ratio"] == 0.8
    lifted = prunus.plan(graph, model, scope="global", max_ratio=1.0, **options)
    assert lost(lifted)["a.weight[0]"] > 0.8
    mild = {**options, "budget": Budget(macs=0.02)}
    with pytest.raises(BudgetError, match=r"max_ratio=0.8") as caught:
        prunus.plan(graph, model, scope="global", **mild)
    assert "max_ratio=1.0 lifts that floor" in caught.value.fix
    for scope in ("local", "isomorphic", ["a.*"]):
        assert max(lost(prunus.plan(graph, model, scope=scope, **mild)).values()) > 0.8
    with pytest.raises(BudgetError) as caught:
        prunus.plan(graph, model, scope="global", max_ratio=0.7, **mild)
    assert "lifts" not in caught.value.fix


def test_ratios_that_are_said_go_beyond_the_floor() -> None:
    model = Tower().eval()
    graph = prunus.trace(model, torch.randn(1, 8))
    plan = prunus.plan(
        graph, model, budget=Budget(macs=0.5), scope="global", ratios={"b.weight[0]": 0.9}
    )
    assert lost(plan)["b.weight[0]"] == 0.9


def test_the_command_line_says_what_was_rounded(capsys) -> None:
    asked = ["plan", "zoo:resnet_fmnist", "--macs", "0.5", "--dry-run"]
    assert main(asked) == 0
    assert "Widths of 32 and more are multiples of 8 by default" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["round_to"] == 8
    assert main([*asked, "--round-to", "1"]) == 0
    assert "by default" not in capsys.readouterr().out
    assert main([*asked[:2], "--macs", "0.01", "--scope", "global", "--dry-run"]) == 3
    assert "max_ratio=1.0 lifts that floor" in capsys.readouterr().err
