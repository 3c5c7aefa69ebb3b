"""Optimal brain surgeon: costs against least squares by brute force, and curves of error."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.graph.program import state_of
from prunus.importance.obs import RIDGE, Reconstruction, removal_order
from prunus.importance.registry import Scores, score

UNITS, EACH, OUTPUTS, ROWS = 5, 2, 3, 60
WIDTH = UNITS * EACH


@pytest.fixture
def features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    rows = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) @ mix
    return rows - rows.mean(0)


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(OUTPUTS, WIDTH, generator=generator, dtype=torch.float64)


COLUMNS = torch.stack([torch.arange(UNITS), torch.arange(UNITS) + UNITS], 1)
"""A unit has two columns that don't lie side by side."""


def reconstruction(weight: Tensor, features: Tensor) -> Reconstruction:
    return Reconstruction(weight, features.mT @ features / ROWS, COLUMNS)


def missed(weight: Tensor, features: Tensor, gone: tuple[int, ...]) -> float:
    """E by lstsq on the features and, for the ridge, one more row for each column."""
    level = float(features.square().mean())
    ridge = (RIDGE * level) ** 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    rows = torch.cat([features / ROWS**0.5, ridge])
    stay = [c for unit in range(UNITS) if unit not in gone for c in COLUMNS[unit].tolist()]
    target = rows @ weight.mT
    fitted = rows[:, stay] @ torch.linalg.lstsq(rows[:, stay], target).solution
    return float((target - fitted).square().sum())


def test_costs_are_what_least_squares_misses(weight: Tensor, features: Tensor) -> None:
    own = reconstruction(weight, features)
    gone: tuple[int, ...] = ()
    for unit in (3, 0, 4):
        before = missed(weight, features, gone)
        wanted = [
            0.0 if u in gone else missed(weight, features, (*gone, u)) - before
            for u in range(UNITS)
        ]
        assert own.costs().tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        own.remove(unit)
        gone = (*gone, unit)


def test_scores_add_up_to_the_curve_of_the_error(weight: Tensor, features: Tensor) -> None:
    own = reconstruction(weight, features)
    scores = removal_order([(own, own.spread)], UNITS)
    order = np.argsort(scores, kind="stable").tolist()
    curve = [missed(weight, features, tuple(order[:k])) for k in range(1, UNITS)]
    steps = np.diff([0.0, *curve])
    assert (np.diff(steps) >= 0).all()  # here no step has to be raised to the one before
    assert np.cumsum(np.sort(scores))[: UNITS - 1] * own.spread == pytest.approx(curve, rel=1e-6)
    cheapest = min(
        itertools.combinations(range(UNITS), 1), key=lambda s: missed(weight, features, s)
    )
    assert order[0] == cheapest[0]


def test_several_at_once_still_score_every_unit(weight: Tensor, features: Tensor) -> None:
    scores = removal_order([(reconstruction(weight, features), 1.0)], UNITS, at_once=2)
    assert np.isfinite(scores).all()
    assert (scores > 0).all()


def scored(
    model: nn.Module, batches: list[Tensor]
) -> tuple[prunus.CouplingGraph, prunus.importance.Statistics, Scores]:
    graph = prunus.trace(model, batches[0])
    seen = prunus.importance.collect(model, graph, batches, "second_moment")
    return graph, seen, score(graph, state_of(model)[0], "obs", statistics=seen)


def test_of_two_units_that_say_the_same_one_is_cheap() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[5] = 2 * model[0].weight[2]
        model[0].bias[5] = 2 * model[0].bias[2]
    graph, _, found = scored(model, [torch.randn(400, 6)])
    scores = found[graph.groups[0].units]
    first, second = np.argsort(scores)[:2]
    assert first in (2, 5)
    assert second not in (2, 5)
    assert scores[first] < 1e-3 < scores[second]


@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise", "transposed"])
def test_the_curve_is_what_compensation_leaves(kind: str) -> None:
    """Through every kind of convolution, and through a depthwise one to what reads behind it."""
    torch.manual_seed(3)
    reader = {
        "plain": lambda: nn.Conv2d(8, 4, 3, padding=1),
        "grouped": lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
        "depthwise": lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        ),
        "transposed": lambda: nn.ConvTranspose2d(8, 4, 3, stride=2),
    }[kind]()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), reader, nn.Flatten(), nn.LazyLinear(2)
    ).eval()
    batches = [torch.randn(64, 3, 8, 8)]
    model(batches[0])
    graph, seen, found = scored(model, batches)
    group = max((g for g in graph.groups if g.name.startswith("0.weight")), key=lambda g: g.size)
    scores = found[group.units]
    others = [g.name for g in graph.groups if g is not group]
    plan = prunus.plan(graph, model, ratio=0.5, importance="obs", statistics=seen, hold=others)
    repairs = prunus.recovery.compensate(model, plan, graph, statistics=seen).repairs
    left = sum(r.left / r.spread for r in repairs if r.tensor != "2.0.weight")
    gone = group.size // 2
    assert left == pytest.approx(np.sort(scores)[:gone].sum(), rel=0.1)


def test_a_group_that_no_weight_reads_is_left_whole() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)
            self.v, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))
            return mixed

    model = Product().eval()
    graph, _, scores = scored(model, [torch.randn(8, 5, 4)])
    told = {g.name: np.isfinite(scores[g.units]).all() for g in graph.groups}
    assert told == {"q.weight[0]": False, "v.weight[0]": True}


def test_outputs_that_go_with_a_unit_are_not_missed() -> None:
    """A whole group of a grouped convolution goes; what reads its outputs misses them."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(12, 2)
    )
    with torch.no_grad():
        model[3].weight[:, :6] = 0
    graph, _, found = scored(model.eval(), [torch.randn(100, 2, 3)])
    group = next(g for g in graph.groups if g.name == "0.weight[0]")
    assert found[group.units] == pytest.approx([0.0, 1.0], abs=1e-2)


def test_curves_of_the_error_share_a_global_budget_out() -> None:
    """Units of one price go by their errors alone, however wide the groups."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)
    ).eval()
    graph, seen, scores = scored(model, [torch.randn(400, 6)])
    inner = ["0.weight[0]", "3.weight[0]"]
    options: dict[str, Any] = {"importance": "obs", "statistics": seen, "include": inner}
    options |= {"round_to": 1, "max_ratio": 1.0}  # the defaults would round and hold a fifth back
    plan = prunus.plan(graph, model, budget=prunus.Budget(macs=0.7), scope="global", **options)
    gone = {graph.group(c.name).units[n] for c in plan.groups for n in c.removed}
    assert gone == set(np.argsort(scores)[: len(gone)])
    assert {choice.name for choice in plan.groups if choice.removed} == set(inner)
