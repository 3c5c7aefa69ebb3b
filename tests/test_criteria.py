"""Criteria of the weights side by side, movement scores, and data on its way to a criterion."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration.statistics import NEEDS
from prunus.errors import DataError, ModelError, PlanError
from prunus.graph.program import state_of
from prunus.importance import importance, names, needs_of, score
from prunus.planner import planning
from tests.test_shrink import Comparing
from tests.test_statistics import bert, tokens

OF_DATA = [name for name in names() if needs_of(name)]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    ).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 8, 8)


def scored(model: nn.Module, args: Any, criterion: Any, **options: Any) -> dict[str, np.ndarray]:
    graph = prunus.trace(model, args)
    found = score(graph, state_of(model)[0], criterion, **options)
    return {group.name: found[group.units] for group in graph.groups}


def test_lamp_measures_against_what_is_left() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[2.0], [1.0], [1.0], [0.0]])
        model[1].weight.zero_()
    (found,) = scored(model, torch.randn(2, 1), "lamp").values()
    np.testing.assert_allclose(found, [1, 1 / 6, 1 / 6, 0])


def test_fpgm_sums_the_distances_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), images()
    filters = model[3].weight.detach().double().flatten(1)
    wanted = torch.stack([(filters - one).norm(dim=1).sum() for one in filters])
    np.testing.assert_allclose(scored(model, x, "fpgm")["3.weight[0]"], wanted, rtol=1e-6)
    monkeypatch.setattr("prunus.importance.magnitude._TABLE", 5)
    np.testing.assert_allclose(scored(model, x, "fpgm")["3.weight[0]"], wanted, rtol=1e-6)


def test_fpgm_takes_a_head_for_one_filter() -> None:
    model = bert()
    graph = prunus.trace(model, (), tokens())
    found = score(graph, state_of(model)[0], "fpgm")
    group = graph.group("bert.encoder.layer.0.attention.self.query.weight[0]")
    wanted = torch.zeros(4, dtype=torch.float64)
    own = model.bert.encoder.layer[0].attention.self
    for module in (own.query, own.key, own.value):
        heads = module.weight.detach().reshape(4, -1)
        wanted += torch.stack([(heads - one).norm(dim=1).sum() for one in heads])
    np.testing.assert_allclose(found[group.units], wanted, rtol=1e-6)


def test_bn_scale_leaves_groups_without_batch_norm_whole() -> None:
    model, x = net(), images()
    nn.init.normal_(model[1].weight)
    found = scored(model, x, "bn_scale")
    np.testing.assert_allclose(found["0.weight[0]"], model[1].weight.detach().abs(), rtol=1e-6)
    assert np.isinf(found["3.weight[0]"]).all()
    plan = prunus.plan(prunus.trace(model, x), model, ratio=0.5, importance="bn_scale")
    assert {choice.name: len(choice.removed) for choice in plan.groups} == {
        "0.weight[0]": 3,
        "3.weight[0]": 0,
    }


def test_a_criterion_that_can_score_nothing_says_what_it_looks_at() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    graph = prunus.trace(model, x)
    with pytest.raises(PlanError, match=r"'bn_scale' can score none of the 1 (.|\n)*batch norm"):
        prunus.plan(graph, model, ratio=0.5, importance="bn_scale")


def mixture() -> nn.Module:
    """A language model with experts, which are all that some criteria score."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=2000, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4
    )
    model: nn.Module = transformers.MixtralForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("criterion", OF_DATA)
def test_what_a_criterion_needs_is_collected_or_asked_for(criterion: str) -> None:
    model, batch = mixture() if criterion == "reap" else bert(), tokens()
    graph = prunus.trace(model, (), batch)
    options: dict[str, Any] = {"ratio": 0.25, "importance": criterion}
    with pytest.raises(DataError, match=rf"'{criterion}' needs calibration data(.|\n)*data=loader"):
        prunus.plan(graph, model, **options)
    plan = prunus.plan(graph, model, data=iter([batch]), **options)
    assert plan.origin["importance"] == criterion
    found = prunus.importance.collect(model, graph, [batch], needs_of(criterion))
    assert plan == prunus.plan(graph, model, statistics=found, **options)
    assert any(choice.removed for choice in plan.groups)
    other = prunus.importance.collect(model, graph, [batch], set(NEEDS) - needs_of(criterion))
    with pytest.raises(DataError, match="needs calibration data"):
        prunus.plan(graph, model, statistics=other, **options)


def test_statistics_of_another_graph_are_refused() -> None:
    model, x = net(), images()
    found = prunus.importance.collect(model, prunus.trace(model, x), [x], "gradient")
    prunus.apply(prunus.plan(prunus.trace(model, x), model, ratio=0.5), model)
    graph = prunus.trace(model, x)
    with pytest.raises(PlanError, match="they speak of 10 units, and this one has 5"):
        prunus.plan(graph, model, ratio=0.5, importance="taylor", statistics=found)


def test_unknown_needs_are_refused_when_registered() -> None:
    with pytest.raises(PlanError, match=r"'hessian' can be collected(.|\n)*gradient"):
        importance("mine", needs=("hessian",))


@pytest.mark.parametrize("kind", [list, iter])
def test_shrink_uses_its_data_for_importance_and_batch_norms(kind) -> None:
    model, data = net(), [images(), images()]
    twin = copy.deepcopy(model)
    budget = prunus.Budget(macs=0.5)
    options = {"importance": "taylor", "recover": "recalibrate"}
    done = prunus.shrink(model, data[0], budget=budget, data=kind(data), **options)
    graph = prunus.trace(twin, data[0])
    plan = prunus.plan(graph, twin, budget=budget, importance="taylor", data=data)
    assert done.plan == plan
    prunus.apply(plan, twin)
    prunus.recovery.recalibrate(twin, data)
    assert torch.equal(model(data[0]), twin(data[0]))
    assert not torch.equal(model[1].running_mean, torch.zeros(len(model[1].running_mean)))


def test_shrink_reads_its_data_once_for_all_its_plans() -> None:
    passes = []

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            passes.append(1)
            return iter([torch.randn(4, 8)])

    model = Comparing().eval()
    budget = prunus.Budget(params=0.7)
    options = {"importance": "flap", "recover": "none"}
    done = prunus.shrink(model, torch.randn(3, 8), budget=budget, data=Data(), **options)
    assert list(done.held) == ["second.weight[0]"]
    assert len(passes) == 1


def test_statistics_that_are_given_are_not_collected_again(monkeypatch) -> None:
    model, x = net(), images()
    graph = prunus.trace(model, x)
    given = prunus.importance.collect(model, graph, [x], "activation")
    monkeypatch.setattr(
        "prunus.planner.planning.gather", lambda *_, **__: pytest.fail("collected again")
    )
    options = {"ratio": 0.3, "importance": "activation", "data": [x], "statistics": given}
    assert prunus.shrink(model, x, **options, each_group=False).certificate.verdict == "exact"


def test_calibration_does_not_stop_the_collector(monkeypatch) -> None:
    """A pass over data makes cycles, which nothing else frees."""
    model, x = net(), images()
    seen = []
    real = planning.gather

    def collect(*args: Any, **kwargs: Any) -> Any:
        seen.append(gc.isenabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(planning, "gather", collect)
    graph = prunus.trace(model, x)
    prunus.plan(graph, model, ratio=0.3, importance="taylor", data=[x])
    assert seen == [True]


@pytest.mark.parametrize("data", [[], None])
def test_shrink_without_the_data_it_needs_leaves_the_model_alone(data) -> None:
    model, x = net(), images()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="data"):
        prunus.shrink(model, x, ratio=0.5, importance="wanda", data=data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shrink_takes_a_loss() -> None:
    model, x = net(), images()
    labels = torch.tensor([0, 1, 2, 0])
    seen = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(tuple(output.shape))
        return F.cross_entropy(output, batch[1])

    prunus.shrink(model, x, ratio=0.5, importance="fisher", data=[(x, labels)], loss=loss)
    assert seen == [(1, 3)] * 4


def test_negative_scores_are_shifted_alike() -> None:
    model, x = net(), images()
    graph = prunus.trace(model, x)
    values = np.arange(graph.unit_count + 1.0) - 5

    found = score(graph, {}, lambda group, context: values[group.units])
    np.testing.assert_array_equal(found[1:], values[1:] - values[1])


def test_movement_sums_what_gradient_descent_does() -> None:
    model, x = net().double(), images().double()
    graph = prunus.trace(model, x)
    movement = prunus.importance.Movement(graph, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = np.zeros(6)
    for labels in torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2], [2, 0, 0, 1]]):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        movement.step()
        for module, dim in ((model[0], 0), (model[1], 0), (model[3], 1)):
            for weight in module.parameters():
                if weight.shape[dim if weight.dim() > 1 else 0] == 6:
                    product = (weight * weight.grad).detach().movedim(dim, 0)
                    wanted -= product.reshape(6, -1).sum(1).numpy()
        optimizer.step()
    group = graph.group("0.weight[0]")
    assert movement.steps == 3
    np.testing.assert_allclose(movement.scores[group.units], wanted, rtol=1e-9)
    scores = score(graph, state_of(model)[0], movement)
    assert scores.min() == 0
    order = np.argsort(movement.scores[1:])
    assert np.array_equal(np.argsort(scores[1:]), order)
    plan = prunus.plan(graph, model, ratio=0.5, importance=movement)
    assert plan.origin["importance"] == "movement"
    removed = next(choice.removed for choice in plan.groups if choice.name == group.name)
    assert sorted(removed) == sorted(np.argsort(wanted)[:3].tolist())


def test_movement_needs_steps_with_gradients_that_are_finite() -> None:
    model, x = net(), images()
    graph = prunus.trace(model, x)
    movement = prunus.importance.Movement(graph, model)
    with pytest.raises(ModelError, match=r"no weight has a gradient(.|\n)*movement.step\(\) betw"):
        movement.step()
    with pytest.raises(DataError, match=r"movement.step\(\) was never called"):
        prunus.plan(graph, model, ratio=0.5, importance=movement)
    (model(x).sum() * float("inf")).backward()
    movement.step()
    assert (movement.steps, movement.skipped) == (0, 1)
    with pytest.raises(DataError, match="all 1 steps had gradients that are not finite"):
        prunus.plan(graph, model, ratio=0.5, importance=movement)
    small = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other = prunus.trace(small, torch.randn(2, 3))
    with pytest.raises(ModelError, match="speak of 10 units, and the graph has 4"):
        prunus.plan(other, small, ratio=0.5, importance=movement)
