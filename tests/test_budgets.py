"""Budgets of every kind, of the whole model and of scopes; ratios, floors and rounding by glob."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.errors import BudgetError, PlanError
from prunus.graph.budget import Budget
from prunus.graph.groups import Lockstep
from prunus.planner.allocate import select
from tests.test_planner import Draft, attention, chain, kept_in, residual, scores_for

INPUT = torch.randn(1, 3, 16, 16)


class Net(nn.Module):
    """A stem, two residual stages of convolutions and a classifier of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3))
        self.stage2 = nn.Sequential(nn.Conv2d(48, 96, 3), nn.BatchNorm2d(96), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net: Net) -> prunus.CouplingGraph:
    return prunus.trace(net, INPUT)


def cut(plan: prunus.Plan, net: nn.Module) -> nn.Module:
    return prunus.apply(plan, copy.deepcopy(net))


class TestBytes:
    def test_bytes_are_those_that_are_stored(self, net, graph) -> None:
        assert graph.cost("bytes") == prunus.report.measure_costs(net, INPUT)["bytes"]
        plan = prunus.plan(graph, net, budget=Budget(bytes=0.5))
        small = prunus.report.measure_costs(cut(plan, net), INPUT)
        assert plan.costs["bytes"] == (graph.cost("bytes"), small["bytes"])
        assert 0.49 < small["bytes"] / graph.cost("bytes") <= 0.5

    def test_every_tensor_counts_by_its_type(self) -> None:
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
        net[2].to(torch.float16)
        net[2].register_buffer("table", torch.zeros(7, dtype=torch.float64), persistent=False)
        net[2].plain = torch.zeros(1000)  # neither parameter nor buffer
        graph = prunus.trace(net[:2], torch.zeros(2, 8))
        assert graph.cost("bytes") == 4 * (8 * 16 + 16 + 4 * 16) + 8
        net.half = net[2]
        assert prunus.trace(net[2], torch.zeros(2, 16, dtype=torch.float16)).cost("bytes") == (
            2 * (16 * 4 + 4) + 8 * 7
        )

    def test_tied_tensors_count_once(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(20, 8)
                self.head = nn.Linear(8, 20, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.head(self.embed(ids))

        graph = prunus.trace(Tied(), torch.zeros(1, 3, dtype=torch.long))
        assert graph.cost("bytes") == 4 * 20 * 8
        assert graph.cost("bytes in head") == graph.cost("bytes in embed") == 4 * 20 * 8


class TestScopes:
    def test_parts_add_up(self, net, graph) -> None:
        for name in ("params", "macs", "bytes"):
            parts = [graph.cost(f"{name} in {child}") for child, _ in net.named_children()]
            assert sum(parts) == graph.cost(name) == graph.cost(f"{name} in *")

    def test_a_part_is_counted_like_the_module_alone(self, net, graph) -> None:
        seen = {}
        copied = copy.deepcopy(net)
        for name, module in copied.named_children():
            module.register_forward_hook(lambda m, a, o, name=name: seen.update({name: a}))
        copied(INPUT)
        for name, module in copied.named_children():
            measured = prunus.report.measure_costs(module, seen[name])
            assert {n: graph.cost(f"{n} in {name}") for n in measured} == measured

    def test_a_bound_of_a_scope_holds_and_is_used_up(self, net, graph) -> None:
        budget = Budget(macs=0.8, within={"stage1": Budget(macs=0.4)})
        plan = prunus.plan(graph, net, budget=budget)
        before, after = plan.costs["macs in stage1"]
        assert 0.38 < after / before <= 0.4
        assert plan.costs["macs"][1] <= 0.8 * plan.costs["macs"][0]
        assert plan.origin["budget"] == {"macs": 0.8, "macs in stage1": 0.4}
        assert prunus.Plan.from_json(plan.to_json()) == plan

    def test_only_what_the_scope_needs_goes(self, net, graph) -> None:
        plan = prunus.plan(graph, net, budget=Budget(within={"head": Budget(params=0.5)}))
        removed = {choice.name: len(choice.removed) for choice in plan.groups}
        assert removed["stem.0.weight[0]"] == removed["stage1.0.weight[0]"] == 0
        assert removed["head.0.weight[0]"] > 0

    def test_an_absolute_bound_of_a_scope(self, net, graph) -> None:
        most = graph.cost("bytes in stage2.*") // 2
        plan = prunus.plan(graph, net, budget=Budget(within={"stage2.*": Budget(bytes=most)}))
        assert plan.costs["bytes in stage2.*"][1] <= most

    def test_scopes_that_match_nothing_are_refused(self, net, graph) -> None:
        with pytest.raises(BudgetError, match=r"'stages' matches nothing(.|\n)*'stage1\.0"):
            prunus.plan(graph, net, budget=Budget(within={"stages": Budget(macs=0.5)}))
        with pytest.raises(BudgetError, match="matches nothing that has macs"):
            prunus.plan(graph, net, budget=Budget(within={"stem.1": Budget(macs=0.5)}))

    def test_a_scope_of_dropped_blocks_bounds_nothing_more(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        args = (torch.randn(1, 5, 16),)
        graph = prunus.trace(model, args)
        budget = Budget(within={"layers.1": Budget(macs=0.5)})
        plan = prunus.plan(graph, model, budget=budget, drop=["layers.1"])
        assert plan.drops == ("layers.1",)
        assert not any(choice.removed for choice in plan.groups)

    def test_scopes_are_those_of_the_model_with_all_its_blocks(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        graph = prunus.trace(model, (torch.randn(1, 5, 16),))
        budget = Budget(within={"layers.2": Budget(macs=0.5)})
        plan = prunus.plan(graph, model, budget=budget, drop=["layers.1"])
        assert {c.name.split(".")[1] for c in plan.groups if c.removed} == {"1"}  # once layers.2
        before, after = plan.costs["macs in layers.2"]
        assert 0.4 < after / before <= 0.5


class Reuse(nn.Module):
    """Tensors that live for long, in place operators, views, and one that is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 64)
        self.c = nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        self.b(first).exp_()
        second = self.b(first).relu_().view(-1, 4, 16).transpose(1, 2).flatten(1)
        return self.c(torch.cat([first, second], 1))


class TestActivation:
    def test_what_is_alive_by_hand(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.a(x)
                active = hidden.relu()
                del hidden
                return self.b(active)

        graph = prunus.trace(Two(), torch.zeros(3, 8))
        assert graph.cost("activation") == 4 * 3 * (8 + 64 + 64)
        kept = graph.all_kept
        kept[1:33] = False
        assert graph.cost("activation", kept) == 4 * 3 * (8 + 32 + 32)

    @pytest.mark.parametrize("name", ["net", "reuse", "attention"])
    @pytest.mark.parametrize("share", [0.85, 0.6])
    def test_the_pruned_model_has_no_more_alive(self, name: str, share: float, net) -> None:
        torch.manual_seed(0)
        models: dict[str, tuple[nn.Module, torch.Tensor]] = {
            "net": (net, INPUT),
            "reuse": (Reuse(), torch.randn(2, 8)),
            "attention": (
                nn.Sequential(
                    nn.Linear(8, 64),
                    nn.TransformerEncoderLayer(64, 4, 96, batch_first=True),
                    nn.Linear(64, 4),
                ),
                torch.randn(2, 5, 8),
            ),
        }
        model, x = models[name]
        graph = prunus.trace(model.eval(), x)
        if name != "attention":  # PyTorch's own packs and copies what its equivalent does not
            assert graph.cost("activation") == prunus.report.measure_activation(model, x)
        plan = prunus.plan(graph, model, budget=Budget(activation=share, params=0.95))
        before, after = plan.costs["activation"]
        assert after == prunus.report.measure_activation(cut(plan, model), x)
        assert share - 0.1 < after / before <= share
        assert plan.costs["params"][1] <= 0.95 * plan.costs["params"][0]

    def test_no_moment_is_worse_than_those_that_are_looked_at(self, net, graph) -> None:
        chosen = np.random.default_rng(0)
        for _ in range(5):
            kept = graph.all_kept
            for group in graph.groups:
                kept[chosen.choice(group.units, group.size // 3, replace=False)] = False
            plan = prunus.Plan.from_mask(graph, kept)
            small = cut(plan, net)
            assert graph.cost("activation", kept) == prunus.report.measure_activation(small, INPUT)

    def test_what_is_out_of_reach_names_the_moment(self, net, graph) -> None:
        with pytest.raises(BudgetError, match=r"activation at .*operator \d+(.|\n)*stop at"):
            prunus.plan(graph, net, budget=Budget(activation=0.5), min_width=32)

    def test_a_graph_without_a_forward_says_so(self) -> None:
        with pytest.raises(BudgetError, match="does not know which tensors are alive"):
            Budget(activation=0.5).limits(chain(8, 8))

    def test_a_scope_has_no_peak(self) -> None:
        with pytest.raises(BudgetError, match="a scope can't have a bound on activation"):
            Budget(within={"stem": Budget(activation=0.5)})

    def test_blocks_that_go_count(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 256, batch_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        args = (torch.randn(1, 5, 16),)
        graph = prunus.trace(model, args)
        plan = prunus.plan(graph, model, budget=Budget(activation=0.5), drop=["layers.1"])
        before, after = plan.costs["activation"]
        assert before == graph.cost("activation")
        assert after == prunus.report.measure_activation(cut(plan, model), args) <= before / 2


class TestWords:
    def test_what_was_given_is_what_is_told(self) -> None:
        budget = Budget(bytes=8_000_000, within={"layer4": Budget(macs=0.3)})
        assert repr(budget) == "Budget(bytes=8000000, within={'layer4': Budget(macs=0.3)})"
        assert budget.requested == {"bytes": 8_000_000, "macs in layer4": 0.3}

    @pytest.mark.parametrize("value", [-0.5, -3, 0, math.nan, math.inf, 1, 1.5, True, "8MB"])
    @pytest.mark.parametrize("name", ["params", "macs", "bytes", "activation"])
    def test_what_is_no_bound_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(BudgetError, match=f"{name}=.* is no budget(.|\n)*fix:"):
            Budget(**{name: value})

    def test_scopes_hold_budgets(self) -> None:
        with pytest.raises(BudgetError, match=r"0\.3 is no budget of a scope"):
            Budget(within={"layer4": 0.3})
        with pytest.raises(BudgetError, match="no scopes of its own"):
            Budget(within={"a": Budget(within={"b": Budget(macs=0.3)})})
        with pytest.raises(BudgetError, match="is no mapping"):
            Budget(within=[("a", Budget(macs=0.3))])
        with pytest.raises(BudgetError, match="bounds nothing"):
            Budget(within={})


class TestRatios:
    def test_a_group_loses_its_share_exactly_and_others_nothing(self, net, graph) -> None:
        plan = prunus.plan(graph, net, ratios={"stage1.0.weight[0]": 0.3, "head.*": 0.25})
        removed = {choice.name: len(choice.removed) for choice in plan.groups}
        assert removed == {
            "stem.0.weight[0]": 0,
            "stage1.0.weight[0]": 19,  # of 64
            "stage1.2.weight[0]": 0,
            "stage2.0.weight[0]": 0,  # head.0 only reads it
            "head.0.weight[0]": 32,
        }
        assert plan.origin["ratios"] == {"stage1.0.weight[0]": 0.3, "head.*": 0.25}

    def test_the_least_important_go(self, net, graph) -> None:
        name = "stage1.0.weight[0]"
        plan = prunus.plan(graph, net, ratios={name: 0.5}, importance="l1")
        (choice,) = [choice for choice in plan.groups if choice.removed]
        weight, after = net.stage1[0].weight.detach(), net.stage1[2].weight.detach()
        l1 = weight.abs().sum((1, 2, 3)) + net.stage1[0].bias.detach().abs()
        assert len(choice.removed) == 32
        assert after.shape[1] == 64
        assert l1[list(choice.removed)].mean() < l1.mean()

    def test_a_budget_takes_the_rest_elsewhere(self, net, graph) -> None:
        name = "stage1.0.weight[0]"
        for ratio in (0.0, 0.25, 0.75):
            plan = prunus.plan(
                graph, net, budget=Budget(macs=0.4), ratios={name: ratio}, round_to=1
            )
            (choice,) = [choice for choice in plan.groups if choice.name == name]
            assert len(choice.removed) == 64 * ratio
            assert 0.39 < plan.costs["macs"][1] / plan.costs["macs"][0] <= 0.4

    def test_held_groups_stay_whole_whatever_their_ratio(self, net, graph) -> None:
        name = "stage1.0.weight[0]"
        plan = prunus.plan(graph, net, ratios={"*": 0.5}, hold=[name])
        removed = {choice.name: len(choice.removed) / choice.size for choice in plan.groups}
        assert removed.pop(name) == 0
        assert set(removed.values()) == {0.5}

    def test_heads_and_their_dims(self) -> None:
        graph = attention(heads=8, dim=16)
        kept = kept_after(graph, {}, ratios={"v.weight[0]": 0.25, "v.weight[0]/2": 0.5})
        assert kept["v.weight[0]"] == 6
        assert kept["v.weight[0]/2"] == 8

    def test_tied_groups_of_different_ratios_are_refused(self) -> None:
        draft = Draft()
        a, b = draft.units(8), draft.units(8)
        draft.layer("a.weight", a, 4)
        draft.layer("b.weight", b, 4)
        draft.layer("out.weight", 2, np.concatenate([a, b]))
        graph = draft.graph(Lockstep("equal count", (a.ravel(), b.ravel()), "one attribute"))
        kept = kept_after(graph, {}, ratios={"a.*": 0.25})
        assert kept == {"a.weight[0]": 6, "b.weight[0]": 6}
        with pytest.raises(PlanError, match=r"a\.weight\[0\](.|\n)*together with b\.weight\[0\]"):
            kept_after(graph, {}, ratios={"a.*": 0.25, "b.*": 0.75})

    def test_contradictions_are_told(self, net, graph) -> None:
        name = "stage1.0.weight[0]"
        cases = [
            ({"ratios": {name: 0.9}, "min_width": 20}, r"keep 20 of its 64(.|\n)*at most 0\.688"),
            ({"ratios": {name: 0.9}, "max_ratio": 0.5}, r"keep 32 of its 64(.|\n)*at most 0\.5"),
            ({"ratios": {name: 0.9}, "exclude": name}, r"can't lose 0\.9(.|\n)*excluded"),
            ({"ratios": {name: 1.0}}, "removes everything"),
            ({"ratios": {name: -0.1}}, "is no ratio"),
            ({"ratios": {name: math.nan}}, "is no ratio"),
            ({"ratios": {"stage9.*": 0.5}}, r"'stage9\.\*' matches no group(.|\n)*ratios="),
            ({"ratios": {name: 0.5}, "ratio": 0.5}, "ratios and a ratio were given"),
        ]
        for options, text in cases:
            with pytest.raises(PlanError, match=text):
                prunus.plan(graph, net, **options)

    def test_a_budget_that_ratios_put_out_of_reach(self, net, graph) -> None:
        ratios = {"st*": 0.1}
        with pytest.raises(BudgetError) as caught:
            prunus.plan(graph, net, budget=Budget(macs=0.2), ratios=ratios)
        text = str(caught.value)
        assert "ratios for 4 groups" in text
        assert "stop at macs" in text


def kept_after(graph: prunus.CouplingGraph, budget: Any, **options: Any) -> dict[str, int]:
    return kept_in(graph, select(graph, scores_for(graph), budget, **options).kept)


class TestByGlob:
    def test_floors_of_some_groups(self) -> None:
        graph = residual()
        free = kept_after(graph, Budget(params=0.3), scope="local")
        options = {"min_width": {"block1.*": 60}, "max_ratio": {"block2.up*": 0.25, "*": 0.9}}
        kept = kept_after(graph, Budget(params=0.5), scope="local", **options)
        assert free["block1.up.weight[0]"] < 48
        assert kept["block1.up.weight[0]"] >= 60
        assert kept["block2.up.weight[0]"] >= 48

    def test_the_most_specific_glob_decides_whatever_the_order(self, net, graph) -> None:
        plans = [
            prunus.plan(graph, net, ratios=dict(ratios))
            for ratios in (
                [("*", 0.125), ("stage1.*", 0.5), ("stage1.0*", 0.25)],
                [("stage1.0*", 0.25), ("stage1.*", 0.5), ("*", 0.125)],
            )
        ]
        assert plans[0].groups == plans[1].groups
        shares = {choice.name: len(choice.removed) / choice.size for choice in plans[0].groups}
        assert shares == {
            "stem.0.weight[0]": 0.125,
            "stage1.0.weight[0]": 0.25,
            "stage1.2.weight[0]": 0.5,
            "stage2.0.weight[0]": 0.125,
            "head.0.weight[0]": 0.125,
        }

    def test_options_by_glob_are_checked(self) -> None:
        graph = chain(8, 8)
        for options, text in [
            ({"min_width": {"conv0*": 0}}, r"min_width\['conv0\*'\] must be a positive.*got 0"),
            ({"max_ratio": {"conv0*": 2}}, r"max_ratio\['conv0\*'\]=2 is no ratio"),
            ({"round_to": {"conv0*": 0.5}}, r"round_to\['conv0\*'\] must be a positive.*got 0.5"),
            ({"round_to": {"linear": 0}}, r"round_to\['linear'\] must be a positive.*got 0"),
            ({"round_to": {"nowhere": 8}}, "matches no group"),
            ({"min_width": {"nowhere": 8}}, "matches no group"),
        ]:
            with pytest.raises(PlanError, match=text):
                kept_after(graph, Budget(params=0.9), **options)


class TestRounding:
    def test_by_kind_of_layer_and_by_glob(self, net, graph) -> None:
        rounding = {"linear": 32, "conv": 8, "stage1.0*": 4, "*": 2}
        plan = prunus.plan(graph, net, budget=Budget(macs=0.45), round_to=rounding)
        kept = {choice.name: choice.size - len(choice.removed) for choice in plan.groups}
        assert kept["head.0.weight[0]"] % 32 == 0
        assert kept["stage2.0.weight[0]"] % 32 == 0  # the classifier reads it
        assert kept["stage1.2.weight[0]"] % 8 == 0
        assert kept["stage1.0.weight[0]"] % 4 == 0
        assert plan.origin["round_to"] == rounding

    def test_32_is_for_groups_of_64(self) -> None:
        graph = chain(48, 64, 128)
        kept = kept_after(graph, Budget(macs=0.4), scope="local", round_to=32)
        assert kept["conv1.weight[0]"] == 32
        assert kept["conv2.weight[0]"] % 32 == 0
        assert kept["conv0.weight[0]"] in (16, 32)

    def test_heads_times_dims_are_one_width(self) -> None:
        graph = attention(heads=8, dim=16, stream=256)
        kept = kept_after(graph, Budget(params=0.4), scope="local", round_to=32)
        assert kept["v.weight[0]"] * kept["v.weight[0]/2"] % 32 == 0
        assert kept["stem.weight[0]"] % 32 == 0

    def test_8_is_kept_to_however_narrow_a_group(self) -> None:
        graph = chain(12, 48)
        kept = kept_after(graph, Budget(macs=0.41), scope="local", round_to=8)
        assert kept["conv0.weight[0]"] == 8


def test_nan_scores_are_counted(net, graph) -> None:
    def broken(group, context):
        scores = torch.ones(group.size).double().numpy()
        if group.name == "stage1.0.weight[0]":
            scores[:3] = math.nan
        return scores

    with pytest.raises(PlanError, match=r"3 NaN among 64(.|\n)*stage1\.0\.weight\[0\]"):
        prunus.plan(graph, net, budget=Budget(macs=0.5), importance=broken)
