"""Cases that users reported failing in other engines, by their numbers.

Every row ends *exact*, or keeps what it can't prune and says why, by operator and source line.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.peers.case_models import CASES, IMAGE, Case, frozen_backbone, the_same_tensor_twice
from prunus.graph.coupling import CouplingGraph
from prunus.graph.plans import Plan
from prunus.surgeon import apply
from prunus.tracer.trace import trace
from tests.pipeline import judge, plan_for, thin

LINE = re.compile(r"(peers/case_models|modules/block)\.py:\d+")
"""Of a replica, or of the library's block in it."""


def _name(row: Case) -> str:
    return f"{row.number} {row.name}".replace("–", "-")


def _graph(row: Case) -> tuple[CouplingGraph, Plan]:
    model = row.build().eval()
    graph = trace(model, *row.example())
    return graph, plan_for(graph, model, thin(graph))


@pytest.mark.parametrize("row", CASES, ids=_name)
def test_case(row: Case) -> None:
    args, kwargs = row.example()
    judged = judge(row.build, *args, kwargs=kwargs)
    assert judged.caught_by == "", judged
    if row.by_witness and judged.testimony is not None:
        assert judged.testimony.verdict == "agrees", judged.testimony


@pytest.mark.parametrize("row", CASES, ids=_name)
def test_case_is_pruned_or_says_why(row: Case) -> None:
    graph, plan = _graph(row)
    cut = {
        axis.tensor for axis in plan.keep if axis.dim == (1 if axis.tensor.startswith("up.") else 0)
    }
    assert set(row.prunable) <= cut
    for name, reason in row.pinned:
        assert name not in cut
        pins = graph.why_pinned(name)
        assert any(reason in pin.reason and LINE.search(pin.source) for _, pin in pins), pins


def test_twice_the_same_tensor_iteratively() -> None:
    """Case 12: prune, trace what is left, prune again, three times."""
    model, x = the_same_tensor_twice().eval(), torch.randn(IMAGE)
    widths = []
    for seed in range(3):
        graph = trace(model, x)
        apply(plan_for(graph, model, thin(graph, seed=seed)), model)
        widths.append(model.get_parameter("first.weight").shape[0])
        assert model.get_parameter("second.weight").shape[1] == 2 * widths[-1]
        assert model(x).shape == (2, 10)
    assert widths == sorted(set(widths), reverse=True)


def test_frozen_parameters_stay_frozen() -> None:
    """Case 30."""
    model = frozen_backbone().eval()
    graph = trace(model, torch.randn(IMAGE))
    apply(plan_for(graph, model, thin(graph)), model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.2.weight",
        "head.2.bias",
    }


def test_a_plan_of_a_model_that_has_run_is_for_a_fresh_one_too() -> None:
    """Case 6."""
    row = next(row for row in CASES if row.name == "ultralytics_pose_head")
    model, (args, kwargs) = row.build().eval(), row.example()
    fresh = row.build().eval()
    model(*args, **kwargs)
    graph = trace(model, args, kwargs)
    apply(plan_for(graph, model, thin(graph)), fresh)
