"""Counts against arithmetic, tables against what they are made of, pictures against bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table
from torch import nn

import models_zoo
import prunus
from prunus import files
from prunus.errors import MissingExtraError
from prunus.graph.axis import Axis
from prunus.graph.plan_records import GroupChoice
from prunus.graph.plans import Plan
from prunus.report import console, pictures, tables
from prunus.report.counting import measure_costs, measure_latency


def text_of(table: Table) -> list[list[str]]:
    """The cells of every row, the header first."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


class Attends(nn.Module):
    """Attention in one call, tied weights, dropout, a buffer and an output that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        q, k, v = self.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 8)
        x = self.drop(self.out(x))
        return self.tied(x) if twice else x


def test_costs_are_counted_by_hand() -> None:
    model = Attends().train()
    x = torch.randn(1, 5, 8)
    attention = 2 * 2 * 5 * 5 * 4
    costs = measure_costs(model, x)
    assert costs == {
        "params": 8 * 24 + 64,
        "macs": 5 * 8 * 24 + attention + 5 * 64,
        "bytes": 4 * (8 * 24 + 64) + 24,
    }
    assert measure_costs(model, x, {"twice": True})["macs"] == costs["macs"] + 5 * 64
    assert model.drop.training


def test_convolutions_count_as_in_the_textbook() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2, padding=1)
    assert measure_costs(conv, torch.zeros(2, 6, 5, 5))["macs"] == 2 * 25 * 4 * 3 * 9


@pytest.mark.parametrize("name", ["resnet20", "bert_tiny", "llama_tiny"])
def test_the_cost_polynomials_agree(name: str) -> None:
    model, inputs = models_zoo.build(name), models_zoo.example_inputs(name)
    graph, counted = prunus.trace(model, inputs), measure_costs(model, inputs)
    assert graph.cost("params") == counted["params"]
    assert graph.cost("macs") == counted["macs"]


def test_latency_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert 0 < measure_latency(model, torch.randn(3, 4), warmup=1, repeats=3) < 1000
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]


def test_stages_table() -> None:
    stages = [
        {"name": "dense", "params": 200, "macs": 4_000_000, "bytes": 0, "accuracy": 93.7},
        {"name": "cut", "params": 100, "macs": 1_000_000, "bytes": 0, "latency_ms": {"1": 1.234}},
    ]
    assert text_of(tables.stages_table(stages)) == [
        ["", "accuracy", "params", "MACs", "bytes", "ms at batch 1"],
        ["dense", "93.70 %", "200 100%", "4.00 M 100%", "0    –", ""],
        ["cut", "", "100  50%", "1.00 M  25%", "0    –", "1.23"],
    ]
    assert "accuracy" not in text_of(tables.stages_table(stages[1:]))[0]


def test_graph_tables() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    graph = prunus.trace(model, torch.randn(2, 3))
    head, row = text_of(tables.groups_table(graph))
    assert head == ["group", "units", "producers", "consumers", "carriers", "remarks"]
    assert row == ["0.weight[0]", "6", "1", "1", "3", "mixing"]
    reasons = [row[0] for row in text_of(tables.pins_table(graph.pins))]
    assert "output 'output' keeps its shape" in reasons
    chain = graph.explain("2.weight[1]", "0.weight[0]")
    rows = text_of(tables.chain_table(Axis("2.weight", 1), chain))[1:]
    assert rows[0][0] == "2.weight[1]"
    assert rows[-1][1] == "0.weight[0]"
    assert [row[1] for row in rows[:-1]] == [row[0] for row in rows[1:]]


def test_names_are_never_taken_for_markup(capsys) -> None:
    plan = Plan({}, {}, groups=(GroupChoice("w[/bold]:smile:", 4, (1,)),))
    console.show("[red]text", tables.widths_table(plan))
    out = capsys.readouterr().out
    assert "[red]text" in out
    assert "w[/bold]:smile:       4      3     75%" in out


def test_tables_in_a_pipe_are_not_cut(capsys) -> None:
    name = "layer." * 60
    console.show(tables.widths_table(Plan({}, {}, groups=(GroupChoice(name, 4, ()),))))
    assert name in capsys.readouterr().out


def test_show_stages_is_public(capsys) -> None:
    prunus.report.show_stages([{"name": "dense", "params": 1, "macs": 1, "bytes": 1}])
    assert "dense" in capsys.readouterr().out


def test_json_is_strict_and_complete() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    document = tables.describe_graph(prunus.trace(model, torch.randn(2, 3)))
    assert json.loads(console.to_json(document)) == document
    assert document["tensors"] == 4
    assert json.loads(console.to_json({"a": [float("nan"), (1, np.inf)]})) == {
        "a": [None, [1, None]]
    }


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    console.write_json({"run": 1}, path)

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_file(path, fail)
    assert json.loads(path.read_text()) == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("groups", [0, 7, 90])
def test_picture_of_any_depth(tmp_path: Path, groups: int) -> None:
    pytest.importorskip("matplotlib")
    choices = tuple(
        GroupChoice(f"stages.{n}.blocks.{n}.mlp.fc1.weight[0]", 8 + n, tuple(range(0, n, 2)))
        for n in range(groups)
    )
    for name in "ab":
        prunus.report.draw_channels(Plan({}, {}, groups=choices), tmp_path / f"{name}.png")
    first, second = ((tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first == second
    height = int.from_bytes(first[20:24], "big")
    rows = min(groups, 60)
    assert height == pytest.approx(120 * (1.3 + 0.26 * max(rows, 3)), abs=2)
    assert [c.name for c in pictures._widest(choices)] == [c.name for c in choices[-60:]]


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("a.png", b"\x89PNG"), ("a", b"\x89PNG")],
)
def test_a_picture_is_what_its_name_says(tmp_path: Path, name, start) -> None:
    pytest.importorskip("matplotlib")
    plan = Plan({}, {}, groups=(GroupChoice("a", 4, (1,)),))
    for folder in "xy":
        (tmp_path / folder).mkdir()
        prunus.report.draw_channels(plan, tmp_path / folder / name)
    drawn = (tmp_path / "x" / name).read_bytes()
    assert drawn.startswith(start)
    assert drawn == (tmp_path / "y" / name).read_bytes()


def test_picture_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    import importlib

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"prunus\[plot\]"):
        pictures.draw_channels(Plan({}, {}), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_runs() -> None:
    assert pictures._runs(np.array([True, True, False, True])) == [(0, 2), (3, 1)]
    assert pictures._runs(np.zeros(0, dtype=np.bool_)) == []
