"""Other bases for the dims of heads: the best products of queries and keys, and values."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunus
from prunus.calibration.sites import kept_units
from prunus.graph.program import state_of
from prunus.recovery.attention_rows import find_products, find_values
from prunus.recovery.compensate import repair_all
from prunus.recovery.head_dims import best_products, mix_products, turn_values

HEADS, DIM, WIDTH = 3, 8, 20


class Attention(nn.Module):
    """Queries, keys and values of their own; ``read`` uses the queries twice."""

    def __init__(
        self, bias: bool = True, read: bool = False, shared: int = 1, bent: bool = False
    ) -> None:
        super().__init__()
        self.shared, self.read, self.dim, self.bent = shared, read, DIM, bent
        self.q = nn.Linear(WIDTH, HEADS * shared * DIM, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM, bias=bias) for _ in range(2))
        self.out = nn.Linear(HEADS * shared * DIM, 7)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        scores = q @ k.mT / 3
        mixed = (scores.tanh() if self.bent else scores).softmax(-1) @ v
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found + q.abs().mean() if self.read else found


def case(**options: Any) -> tuple[Attention, Tensor, prunus.CouplingGraph]:
    torch.manual_seed(0)
    model = Attention(**options).double().eval()
    x = torch.randn(40, 6, WIDTH, dtype=torch.float64) @ torch.randn(WIDTH, WIDTH).double() / 3 + 1
    return model, x, prunus.trace(model, x[:2])


def plan_of(model: nn.Module, graph: prunus.CouplingGraph, *, heads: bool = False) -> prunus.Plan:
    """Half of the dims of queries and keys, and of values; or one head of three."""
    names = [g.name for g in graph.groups if (g.size % DIM == 0) != heads]
    held = [g.name for g in graph.groups if g.name not in names]
    return prunus.plan(graph, model, ratio=0.5, hold=held)


def products(model: Attention, x: Tensor) -> Tensor:
    """The scores of every query with every key of all samples, less what a query has with all."""
    with torch.no_grad():
        q, k = (model.split(layer(x)).transpose(0, 1).flatten(1, 2) for layer in (model.q, model.k))
    k = k if model.bent else k - k.mean(1, keepdim=True)
    return q @ k.repeat_interleave(len(q) // len(k), 0).mT


@torch.no_grad()
def off(dense: nn.Module, smaller: nn.Module, *args: Any, **kwargs: Any) -> float:
    wanted, found = (
        torch.cat([t.flatten() for t in tree_leaves(m(*args, **kwargs)) if isinstance(t, Tensor)])
        for m in (dense, smaller)
    )
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("count", [1, 3, 5])
def test_products_are_the_best_of_their_rank(count: int) -> None:
    torch.manual_seed(count)
    q, k = (torch.randn(50, DIM).double() @ torch.randn(DIM, DIM).double() for _ in range(2))
    a, b, squares = best_products(q.mT @ q / 50, k.mT @ k / 50, count)
    whole = q @ k.mT
    values = torch.linalg.svdvals(whole)  # Eckart & Young, on the materialised scores
    missed = (whole - (q @ a) @ (k @ b).mT).square().sum()
    assert a.shape == b.shape == (DIM, count)
    assert float(missed) == pytest.approx(float(values[count:].square().sum()), rel=1e-6)
    assert float(squares[count:].sum()) == pytest.approx(float(missed) / 50**2, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"shared": 2}, {"bent": True}])
def test_the_predicted_error_of_scores_is_the_measured_one(options: dict[str, Any]) -> None:
    model, x, graph = case(**options)
    plan = plan_of(model, graph)
    smaller = copy.deepcopy(model)
    done = prunus.recovery.compensate(smaller, plan, graph, [x])
    report = next(r for r in done.repairs if "·" in r.tensor)
    wanted = products(model, x)
    missed = (products(smaller, x) - wanted).square().mean((1, 2)).sum()
    assert report.left == pytest.approx(float(missed), rel=1e-5)
    assert report.spread == pytest.approx(float(wanted.square().mean((1, 2)).sum()), rel=1e-5)
    cut = products(prunus.apply(plan, copy.deepcopy(model)), x)
    assert report.cut == pytest.approx(float((cut - wanted).square().mean((1, 2)).sum()), rel=1e-5)
    assert 0 < report.left < report.cut


@pytest.mark.parametrize("shared", [1, 2])
def test_values_in_another_basis_are_the_same_model_and_miss_less(shared: int) -> None:
    model, x, graph = case(shared=shared)
    plan = plan_of(model, graph)
    seen = prunus.importance.collect(model, graph, [x], "second_moment")
    turned = turn_values(graph, plan, state_of(model)[0], seen.sites)
    assert set(turned.state) == {"v.weight", "v.bias", "out.weight"}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**model.state_dict(), **turned.state})
    assert not torch.equal(twin.v.weight, model.v.weight)
    assert off(model, twin, x) < 1e-10
    again = prunus.importance.collect(twin, graph, [x], "second_moment")
    (site,) = (s for s in again.sites if s.tensor == "out.weight")
    (told,) = (s for s in turned.sites if s.tensor == "out.weight")
    assert torch.allclose(told.moments.covariance(), site.moments.covariance(), atol=1e-9)
    assert torch.allclose(told.moments.mean, site.moments.mean, atol=1e-9)
    done = prunus.recovery.compensate(copy.deepcopy(model), plan, graph, [x])
    plain = repair_all(model, plan, graph, seen)[0]
    before = next(new.report for c, new in plain if c.tensor == "out.weight")
    after = next(r for r in done.repairs if r.tensor == "out.weight")
    assert after.left < 0.9 * before.left


def test_a_projection_that_is_exactly_of_fewer_dims_loses_nothing() -> None:
    model = case(bias=False)[0]
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):  # of every head: dims from half as many
            basis = torch.randn(HEADS, DIM, DIM // 2).double()
            layer.weight.copy_((basis @ torch.randn(HEADS, DIM // 2, WIDTH).double()).flatten(0, 1))
    stem = nn.Linear(5, WIDTH).double()
    with torch.no_grad():
        stem.weight[::2] = 0  # half of what the projections read is constant
    whole = nn.Sequential(stem, model).eval()
    inputs = torch.randn(60, 6, 5).double()
    graph = prunus.trace(whole, inputs[:2])
    heads = [g.name for g in graph.groups if g.size == HEADS]

    def odd_ones(group: Any, _: Any) -> Any:
        return np.arange(group.size) % 2 + 0.1

    plan = prunus.plan(graph, whole, ratio=0.5, hold=heads, importance=odd_ones)
    smaller = copy.deepcopy(whole)
    done = prunus.recovery.compensate(smaller, plan, graph, [inputs], ridge=1e-12)
    assert {"1.q.bias", "1.k.bias", "1.v.bias"} <= set(done.plan.biases)
    assert off(whole, prunus.apply(plan, copy.deepcopy(whole)), inputs) > 0.1
    assert off(whole, smaller, inputs) < 1e-4


def test_undo_puts_every_basis_back() -> None:
    model, x, graph = case()
    smaller = copy.deepcopy(model)
    prunus.recovery.compensate(smaller, plan_of(model, graph), graph, [x]).undo()
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.parameters() for m in (model, smaller)), strict=True)
    )


def test_queries_that_are_read_elsewhere_keep_their_basis() -> None:
    model, x, graph = case(read=True)
    plan = plan_of(model, graph)
    found, left = mix_products(
        graph, plan, kept_units(graph, plan), state_of(model)[0],
        prunus.importance.collect(model, graph, [x], "second_moment").sites,
    )  # fmt: skip
    assert found == []
    assert list(left.values()) == ["abs reads its projection as well"]
    assert len(find_values(graph)) == 1


def test_whole_heads_leave_bases_alone() -> None:
    model, x, graph = case()
    plan = plan_of(model, graph, heads=True)
    done = prunus.recovery.compensate(copy.deepcopy(model), plan, graph, [x])
    assert [r.tensor for r in done.repairs] == ["out.weight"]
    assert done.left == {}


FAMILIES = {
    "bert": ("BertModel", "BertConfig", {}),
    "gpt2": ("GPT2Model", "GPT2Config", {"n_layer": 2, "n_head": 4, "n_embd": 64}),
    "llama": ("LlamaModel", "LlamaConfig", {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str, implementation: str) -> None:
    pytest.importorskip("transformers")
    import transformers

    kind, config, options = FAMILIES[family]
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "attn_implementation": implementation,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes | options)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(3.0)  # else attention is even
    batch = {"input_ids": torch.randint(3, 50, (40, 12)), "use_cache": False}
    graph = prunus.trace(model, (), batch)
    dims = [g.name for g in graph.groups if "attn" in g.name or "attention" in g.name]
    dims = [name for name in dims if graph.group(name).size in (8, 16, 32)]
    plan = prunus.plan(graph, model, ratio=0.5, hold=[
        g.name for g in graph.groups if g.name not in dims
    ])  # fmt: skip
    assert any(choice.removed for choice in plan.groups)
    smaller = copy.deepcopy(model)
    done = prunus.recovery.compensate(smaller, plan, graph, [batch])
    mixed = [r for r in done.repairs if "q" in r.tensor.split(".")[-2] or "·" in r.tensor
             or "c_attn" in r.tensor]  # fmt: skip
    if family == "llama":  # a rotation lies between, which knows pairs of dims
        assert not mixed
    else:
        assert len(mixed) == len(find_products(graph)[0]) == 2
        assert all(r.left < 0.7 * r.cut for r in mixed)
    cut = prunus.apply(plan, copy.deepcopy(model))
    assert off(model, smaller, **batch) < 0.8 * off(model, cut, **batch)
