"""Plans judged by the smaller, repaired model: the search for factors of scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import DataError, PlanError
from prunus.graph.budget import Budget
from prunus.planner.stitching import Stitcher, search_coefficients

HALF = Budget(macs=0.5)
LESS = Budget(macs=0.4)
Case = tuple[nn.Module, prunus.CouplingGraph, list[Tensor]]


class Net(nn.Module):
    """Three layers, of which the first is worth more than its scores say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 4, 1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(torch.relu(self.a(x)))).relu()
        found: Tensor = self.c(x).mean((2, 3))
        return found


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(16, 3, 9, 9) for _ in range(3)]
    prunus.recalibrate(model, data)
    return model, prunus.trace(model, data[0][:1]), data


def error_of(plan: prunus.Plan, case: Case) -> float:
    model, graph, data = case
    seen = prunus.collect(model, graph, data, "second_moment")
    return Stitcher(graph, model, data, seen).build(plan)[1]


def test_a_search_is_never_worse_than_its_first_trial_and_tells_both(case: Case) -> None:
    model, graph, data = case
    told: list[str] = []
    options = {"budget": LESS, "scope": "global", "data": data, "importance": "obs"}
    options |= {"round_to": 1, "max_ratio": 1.0}
    found = prunus.plan(graph, model, solver="spdy", trials=12, progress=told.append, **options)
    first = prunus.plan(graph, model, solver="dynamic", **options)
    search = found.origin["search"]
    assert search["error"] <= search["error_at_first"]
    assert error_of(found, case) == pytest.approx(search["error"], rel=1e-3)
    assert error_of(first, case) == pytest.approx(search["error_at_first"], rel=1e-3)
    assert found.cost("macs").share <= 0.4
    assert len(told) == 12
    assert found.origin["solver"] == "spdy"
    assert prunus.verify(found, model, data[0]).verdict == "exact"


def test_the_same_seed_gives_the_same_plan_and_the_model_stays(case: Case) -> None:
    model, graph, data = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"budget": HALF, "scope": "global", "data": data, "solver": "spdy", "trials": 4}
    one, two = (prunus.plan(graph, model, **options) for _ in range(2))
    assert one.keep == two.keep
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_shrink_and_a_latency_budget(case: Case) -> None:
    model, graph, data = case
    options = {"scope": "global", "solver": "spdy", "trials": 3}
    small = prunus.shrink(model, data[0][:1], budget=HALF, data=data, **options)
    assert small.plan.origin["search"]["trials"] == 3
    with pytest.raises(DataError, match="solver='spdy' needs calibration data"):
        prunus.plan(graph, Net().eval(), budget=HALF, **options)
    timed = {"budget": Budget(latency=0.5), "latency": prunus.measure(model, data[0], rounds=1)}
    with pytest.raises(PlanError, match="can't be combined with a latency budget"):
        prunus.plan(graph, model, data=data, **timed, **options)
    with pytest.raises(PlanError, match="trials must be an int ≥ 1; got 0"):
        prunus.plan(graph, model, budget=HALF, data=data, **{**options, "trials": 0})
    with pytest.raises(PlanError, match="solver can't be combined with ratio="):
        prunus.plan(graph, Net().eval(), ratio=0.5, data=data, **options)
    with pytest.raises(PlanError, match="can't be combined with scope='local'"):
        prunus.plan(graph, model, budget=HALF, data=data, solver="spdy")


def test_a_trial_that_can_not_be_compared_is_the_worst() -> None:
    errors = iter([float("nan"), 3.0, 2.0, float("nan"), 4.0])
    found = search_coefficients(
        ["a", "b"], lambda c: tuple(c.values()), lambda _: next(errors), trials=5
    )
    assert (found.error, found.best != (1.0, 1.0)) == (2.0, True)
    assert found.first != found.first
