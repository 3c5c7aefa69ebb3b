"""Files that older versions wrote: each is read, and does what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import prunus
from prunus.checkpoint.model_file import SCHEMA
from prunus.errors import FormatError, PlanError
from prunus.graph.plan_json import VERSION
from prunus.graph.plans import Plan
from prunus.planner.search.sensitivity import Sensitivity
from tests.format_models import MODELS, sample

FIRST = Path(__file__).parent / "fixtures" / "v1"
"""Written by the versions that knew the first form of each file."""

PLANS = {path.name.partition(".")[0]: path for path in sorted(FIRST.glob("*.plan.json"))}
OF_MODEL = {"drops": "blocks", "biases": "biasless", "steps": "mlp"}


def test_there_is_a_file_of_every_kind() -> None:
    assert len(PLANS) == 8
    kinds = [json.loads(path.read_text()) for path in PLANS.values()]
    assert all(document["prunus_plan"] == 1 for document in kinds)
    for field in ("edits", "drops", "biases"):
        assert any(document.get(field) for document in kinds), field
    assert VERSION > 1
    assert SCHEMA > 1


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_the_first_form_applies(name: str) -> None:
    plan = Plan.load(PLANS[name])
    model, x = MODELS[OF_MODEL.get(name, name)](), sample(OF_MODEL.get(name, name))
    before = sum(p.numel() for p in model.parameters())
    forward_fn = "encode" if name == "entry" else None
    prunus.apply(plan, model, forward_fn=forward_fn)
    assert 0 < sum(p.numel() for p in model.parameters()) < before
    assert torch.isfinite(getattr(model, forward_fn or "forward")(x)).all()
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(again.to_json())["prunus_plan"] == VERSION


@pytest.mark.parametrize("name", ["blocks", "conv", "encoder"])
def test_an_artefact_of_the_first_form_loads(name: str) -> None:
    model = prunus.load(FIRST / f"{name}.safetensors", build=MODELS[name])
    right = MODELS[name]()
    plan = Plan.load(PLANS["drops" if name == "blocks" else name])
    prunus.apply(plan, right)
    if name != "blocks":  # fitted to what went
        for a, b in zip(model.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.allclose(model(sample(name)), right(sample(name)), atol=1e-5)


def test_an_artefact_without_a_plan_loads() -> None:
    model = prunus.load(FIRST / "whole.safetensors", build=MODELS["mlp"])
    assert torch.equal(model(sample("mlp")), MODELS["mlp"]()(sample("mlp")))


def test_a_table_of_the_first_form_is_read(tmp_path: Path) -> None:
    table = Sensitivity.load(FIRST / "plain.sensitivity.json")
    assert table.sizes == {"0.weight[0]": 8}
    table.save(tmp_path / "again.json")
    assert Sensitivity.load(tmp_path / "again.json") == table


def test_files_of_later_versions_say_so(tmp_path: Path) -> None:
    text = PLANS["mlp"].read_text().replace('"prunus_plan":1', '"prunus_plan":99')
    with pytest.raises(PlanError, match=r"version 99(.|\n)*versions 1, 2(.|\n)*plan anew"):
        Plan.from_json(text)
    text = (FIRST / "plain.sensitivity.json").read_text().replace('"version": 1', '"version": 99')
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(FormatError, match=r"version 99(.|\n)*start anew"):
        Sensitivity.load(tmp_path / "table.json")
