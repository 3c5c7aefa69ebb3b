"""What compensation says of data, options and models that are not as usual."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import DataError, ModelError, PlanError


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build() -> tuple[nn.Module, Tensor, prunus.CouplingGraph, prunus.Plan]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(5, 9))
    model.add_module("gelu", nn.GELU())
    model.add_module("reader", nn.Linear(9, 4))
    model, x = model.double().eval(), noisy((30, 7, 5))
    graph = prunus.trace(model, x)
    return model, x, graph, prunus.plan(graph, model, ratio=0.4, importance="random", seed=1)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, DataError, "needs calibration data"),
        ({"data": []}, DataError, "empty"),
        ({"data": [torch.full((2, 7, 5), torch.nan, dtype=torch.float64)]}, DataError, "NaN"),
        ({"data": [noisy((2, 7, 5))], "method": "magic"}, PlanError, "magic"),
        ({"data": [noisy((2, 7, 5))], "ridge": -1.0}, PlanError, "ridge is -1"),
        ({"data": [noisy((2, 7, 5))], "ridge": float("nan")}, PlanError, "ridge is nan"),
        ({"data": [noisy((2, 7, 5))], "memory_limit": 10}, DataError, "memory_limit"),
    ],
)
def test_bad_input_leaves_the_model_alone(options: Any, error: Any, said: str) -> None:
    model, _, graph, plan = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=said):
        prunus.recovery.compensate(model, plan, graph, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.reader.in_features == 9


def test_few_samples_are_said_and_raise_the_ridge() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 3)).double().eval()
    few, many = noisy((10, 6)), noisy((400, 6))
    graph = prunus.trace(model, few)
    plan = prunus.plan(graph, model, ratio=0.5)
    small = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"2.weight: 20 kept input channels were fitted on only 10 samples"
    ) as warned:
        done = prunus.recovery.compensate(small, plan, graph, [few])
    assert [one.filename for one in warned] == [__file__]
    assert done.repairs[0].ridge > 0.01 * done.repairs[0].spread  # and not a thousandth
    enough = prunus.recovery.compensate(model, plan, graph, [many])
    assert enough.repairs[0].ridge < done.repairs[0].ridge / 10


@pytest.mark.parametrize("kind", ["half", "mapping", "constant"])
def test_what_loaders_and_models_may_be(kind: str) -> None:
    """Half precision, batches that are mappings, features that never change."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 12))
    model.add_module("gelu", nn.GELU())
    model.add_module("last", nn.Linear(12, 3))
    rows = torch.ones(200, 6) if kind == "constant" else torch.randn(200, 6)
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    model, rows = model.to(dtype).eval(), rows.to(dtype)
    graph = prunus.trace(model, rows)
    plan = prunus.plan(graph, model, ratio=0.5)
    wanted, cut = model(rows), copy.deepcopy(model)
    prunus.apply(plan, cut)
    data = [{"input": rows}] if kind == "mapping" else [rows]
    done = prunus.recovery.compensate(model, plan, graph, data)
    assert model.last.weight.dtype == dtype
    assert done.repairs[0].left < done.repairs[0].cut
    near, far = ((m(rows) - wanted).float().square().mean() for m in (model, cut))
    assert near < 0.8 * far


def test_statistics_of_something_else_are_refused() -> None:
    model, x, graph, plan = build()
    with pytest.raises(DataError, match="second moments"):
        prunus.recovery.compensate(
            model,
            plan,
            graph,
            statistics=prunus.importance.collect(model, graph, [x], "activation"),
        )


def test_a_model_with_weights_not_loaded_is_refused_and_stays_whole() -> None:
    model, x, graph, plan = build()
    model.reader.to("meta")
    before = model.first.weight.clone()
    with pytest.raises(ModelError, match=r"reader\.weight has a shape but no values"):
        prunus.recovery.compensate(model, plan, graph, [x])
    assert torch.equal(model.first.weight, before)
    assert model.reader.in_features == 9
