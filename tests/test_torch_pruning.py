"""Importances of Torch-Pruning: the scores that it gives itself, and scores where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.errors import ModelError, PlanError
from prunus.graph.program import state_of
from prunus.importance.registry import Context, Scores
from prunus.importance.torch_pruning import TorchPruning

tp = pytest.importorskip("torch_pruning")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A branch around a convolution, a depthwise one, a transposed one, and a flattened picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.depth, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 10, 1)
        self.up = nn.ConvTranspose2d(10, 4, 2, stride=3)
        self.head = nn.Linear(4 * 17 * 17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(x).relu())
        x = self.up(self.point(self.depth(x)).relu())
        out: Tensor = self.head(x.flatten(1))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(X).square().sum().backward()
    return model


def scored(model: nn.Module, criterion: Any, inputs: Tensor = X, seed: int = 0) -> dict[str, Any]:
    graph = prunus.trace(model, inputs)
    context = Context(graph, state_of(model)[0], seed)
    adapted = TorchPruning(criterion, model)
    return {group.name: adapted(group, context) for group in graph.groups}


ROOTS = {
    "stem.weight[0]": ("stem", tp.prune_conv_out_channels),
    "inner.weight[0]": ("inner", tp.prune_conv_out_channels),
    "point.weight[0]": ("point", tp.prune_conv_out_channels),
    "up.weight[1]": ("up", tp.prune_conv_out_channels),
}


def own_scores(model: nn.Module, criterion: Any) -> dict[str, Scores | None]:
    """What Torch-Pruning makes of its own groups."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=X)
    found: dict[str, Scores | None] = {}
    for name, (layer, prune) in ROOTS.items():
        module = model.get_submodule(layer)
        width = graph.get_out_channels(module)
        scores = criterion(graph.get_pruning_group(module, prune, idxs=list(range(width))))
        found[name] = None if scores is None else scores.double().numpy()
    return found


CRITERIA = {
    "l1": lambda: tp.importance.MagnitudeImportance(p=1),
    "l2": lambda: tp.importance.MagnitudeImportance(p=2),
    "l2 of the first layer": lambda: tp.importance.MagnitudeImportance(group_reduction="first"),
    "largest": lambda: tp.importance.MagnitudeImportance(
        group_reduction="max", target_types=[nn.Conv2d]
    ),
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.pruner.importance.FPGMImportance,
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
    "bn scale": tp.importance.BNScaleImportance,
}


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_those_that_torch_pruning_gives_its_own_groups(net: Net, name: str) -> None:
    wanted = own_scores(net, CRITERIA[name]())
    found = scored(net, CRITERIA[name]())
    assert found.keys() == wanted.keys()
    for group, scores in found.items():
        own = wanted[group]
        assert scores == pytest.approx(np.inf if own is None else own, rel=1e-5), group


class Attention(nn.Module):
    """Heads that have nine channels each where they are made and three where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.qkv, self.out, self.heads = nn.Linear(6, 18), nn.Linear(6, 6), 2

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.out(mixed.flatten(2))
        return out


def test_heads_are_scored_by_the_mean_over_their_channels() -> None:
    torch.manual_seed(1)
    model = Attention().eval()
    criterion = tp.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
    found = scored(model, criterion, torch.randn(2, 4, 6))
    per_row = model.qkv.weight.detach().abs().sum(1).view(3, 2, 3)
    per_column = model.out.weight.detach().abs().sum(0).view(2, 3)
    heads = (per_row.sum((0, 2)) + per_column.sum(1)) / 9  # of 9 rows of queries, keys and values
    assert any(
        scores.shape == (2,) and scores == pytest.approx(heads.numpy(), rel=1e-6)
        for scores in found.values()
    )


def test_groups_of_a_convolution_count_the_channels_of_all_groups() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Conv1d(8, 4, 1, groups=2), nn.Flatten()).eval()
    criterion = tp.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
    found = scored(model, criterion, torch.randn(2, 2, 3))
    made = model[0].weight.detach().abs().sum((1, 2)).view(2, 4)
    # Torch-Pruning gives a channel the weights that read its place in every group.
    read = model[1].weight.detach().abs().sum((0, 2))
    assert any(
        scores.shape == (4,) and scores == pytest.approx((made.mean(0) + read).numpy(), rel=1e-6)
        for scores in found.values()
    )


def test_an_importance_is_passed_as_it_is(net: Net) -> None:
    wanted = own_scores(net, tp.importance.TaylorImportance())
    graph, taylor = prunus.trace(net, X), tp.importance.TaylorImportance()
    plan = prunus.plan(graph, net, ratio=0.5, importance=taylor)
    assert plan.origin["importance"] == "torch_pruning.TaylorImportance"
    for name, scores in wanted.items():
        assert scores is not None
        axis = next(axis for axis in plan.keep if str(axis) == name)
        best = np.argsort(-scores, kind="stable")[: len(plan.keep[axis])]
        assert sorted(best) == list(plan.keep[axis])
    certificate = prunus.shrink(net, X, ratio=0.5, importance=taylor).certificate
    assert certificate is not None
    assert certificate.verdict == "exact"


def test_random_scores_are_those_of_the_seed_and_leave_the_random_state_alone(net: Net) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        scored(net, tp.importance.RandomImportance(), seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, scores in first.items():
        assert (scores == again[name]).all()
        assert (scores != other[name]).all()
    assert (first["stem.weight[0]"][:4] != first["up.weight[1]"]).all()


def test_what_a_criterion_does_not_look_at_stays_whole(net: Net) -> None:
    found = scored(net, tp.importance.MagnitudeImportance(target_types=[nn.BatchNorm2d]))
    assert np.isfinite(found.pop("stem.weight[0]")).all()
    assert all(np.isinf(scores).all() for scores in found.values())
    graph = prunus.trace(net, X)
    blind = tp.importance.MagnitudeImportance(target_types=[nn.GRU])
    with pytest.raises(PlanError, match=r"can score none of the 4 groups(?s:.)*Torch-Pruning"):
        prunus.plan(graph, net, ratio=0.5, importance=blind)


def test_bare_parameters_are_not_looked_at() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.T @ self.b.T

    found = scored(Scale(), tp.importance.MagnitudeImportance(), torch.ones(2, 3))
    assert found
    assert all(np.isinf(scores).all() for scores in found.values())


def test_scores_of_another_number_of_channels_are_refused(net: Net) -> None:
    only_flattened = tp.importance.MagnitudeImportance(target_types=[nn.Linear])
    graph = prunus.trace(net, X)
    with pytest.raises(
        PlanError, match=r"returned shape \(1156,\)(?s:.)*up\.weight\[1\](?s:.)*has 4"
    ):
        prunus.plan(graph, net, ratio=0.5, importance=only_flattened)


def test_weights_without_values_are_refused(net: Net) -> None:
    graph = prunus.trace(net, X)
    with pytest.raises(ModelError, match="no values"):
        prunus.plan(graph, net.to("meta"), ratio=0.5, importance=tp.importance.LAMPImportance())


def test_what_the_criterion_itself_raises_is_raised(net: Net) -> None:
    net.zero_grad()
    graph = prunus.trace(net, X)
    with pytest.raises(AttributeError, match="NoneType"):
        prunus.plan(graph, net, ratio=0.5, importance=tp.importance.TaylorImportance())


def test_any_function_of_a_group_of_torch_pruning_serves_when_wrapped(net: Net) -> None:
    def position(group: Any) -> Tensor:
        return torch.tensor(group[0].root_idxs, dtype=torch.float32)

    found = scored(net, position)
    assert found["inner.weight[0]"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["inner.weight[0]"].dtype == np.float64
