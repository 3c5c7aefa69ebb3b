"""Tables of sensitivities that drive plans and the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cli import main
from prunus.errors import PlanError


def draw(seed: int, count: int = 32) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


DATA = [draw(seed) for seed in range(5)]
TEST = draw(99, 64)
ROWS = {"include": ["a.*", "b.*"], "ratios": [0.25, 0.5, 0.75]}


class Normed(nn.Module):
    """Linears with batch norms in between: two groups of which others read, and a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm1 = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.b, self.norm2 = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.c, self.norm3 = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.d = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.a(x)).relu()
        x = self.norm2(self.b(x)).relu()
        answer: Tensor = self.d(self.norm3(self.c(x)).relu())
        return answer


class Closeness:
    """Minus the distance to the whole model's outputs on other data; counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        with torch.no_grad():
            self.whole = copy.deepcopy(model).eval()(TEST)
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return -float((model(TEST).detach() - self.whole).norm())


def net() -> nn.Module:
    return prunus.recovery.recalibrate(Normed().eval(), DATA)


@pytest.fixture
def bench():
    model = net()
    return prunus.trace(model, DATA[0]), model, Closeness(model)


def test_without_a_budget_groups_lose_what_is_tolerated(bench) -> None:
    graph, model, metric = bench
    table = prunus.planner.search.sensitivity(graph, model, metric, tolerance=5.0, **ROWS)
    plan = prunus.planner.search.plan_by_sensitivity(table, graph, model)
    assert plan.keep
    assert plan.keep == prunus.plan(graph, model, ratios=table.tolerated).keep
    table = prunus.planner.search.sensitivity(graph, model, metric, **ROWS)
    with pytest.raises(PlanError, match="no budget, and the table has no tolerated shares"):
        prunus.planner.search.plan_by_sensitivity(table, graph, model)


FILE = """
import sys
sys.path.insert(0, {tests!r})
from test_sensitivity_tables import DATA, Closeness, net as made
def net(): return made()
def example_inputs(): return DATA[0]
def data(): return iter(DATA)
def metric(model): return Closeness(made())(model)
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(FILE.format(tests=str(Path(__file__).parent)))
    return str(tmp_path / "own.py")


def test_a_table_drives_plan_and_shrink(own, bench, tmp_path, capsys) -> None:
    graph, model, metric = bench
    table = prunus.planner.search.sensitivity(graph, model, metric, tolerance=5.0)
    file, other, out = (tmp_path / name for name in ("table.json", "other.json", "plan.json"))
    table.save(file)
    drive = [f"{own}:net", "--sensitivity", str(file)]
    budget = prunus.Budget(macs=0.6)
    wanted = prunus.planner.search.plan_by_sensitivity(table, graph, model, budget)
    assert wanted.keep != prunus.plan(graph, model, budget=budget).keep
    assert main(["plan", *drive, "--macs", "0.6", "--out", str(out), "--json"]) == 0
    assert prunus.Plan.load(out).keep == wanted.keep
    assert json.loads(capsys.readouterr().out)["budget"] == {"macs": 0.6}
    assert main(["shrink", *drive, "--macs", "0.6", "--plan", str(out), "--json"]) == 0
    assert prunus.Plan.load(out).keep == wanted.keep
    assert json.loads(capsys.readouterr().out)["certificate"]["verdict"] == "exact"

    tolerated = prunus.planner.search.plan_by_sensitivity(table, graph, model)
    assert main(["plan", *drive, "--out", str(out)]) == 0
    assert prunus.Plan.load(out).keep == tolerated.keep != wanted.keep

    data = ["--importance", "taylor", "--data", f"{own}:data"]
    prunus.planner.search.sensitivity(
        graph, model, metric, importance="taylor", data=DATA, path=other
    )
    drive = [f"{own}:net", "--sensitivity", str(other), "--macs", "0.6", *data]
    assert main(["shrink", *drive, "--no-verify", "--plan", str(out)]) == 0
    ranked = prunus.Plan.load(out)
    assert ranked.origin["importance"] == "taylor"
    assert ranked.cost("macs").share <= 0.6


def test_globs_choose_rows_of_a_table(own, bench, tmp_path, capsys) -> None:
    graph, model, metric = bench
    file, out = tmp_path / "table.json", tmp_path / "plan.json"
    prunus.planner.search.sensitivity(graph, model, metric, path=file)
    asked = ["plan", f"{own}:net", "--sensitivity", str(file), "--macs", "0.7"]
    every = {"a.weight[0]", "b.weight[0]", "c.weight[0]"}
    for globs, whole in (
        ([], set()),
        (["--exclude", "b.weight[0]"], {"b.weight[0]"}),
        (["--include", "b.weight[0]"], {"a.weight[0]", "c.weight[0]"}),
    ):
        assert main([*asked, *globs, "--out", str(out)]) == 0
        plan = prunus.Plan.load(out)
        assert {choice.name for choice in plan.groups if choice.removed} == every - whole
        assert 0.6 < plan.cost("macs").share <= 0.7


class Comparing(nn.Module):
    """Its forward takes another path when ``second`` changes, by what no size tells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 16)
        self.third, self.last = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        whole = x.untyped_storage().nbytes() == x.element_size() * len(x) * 16
        x = x.relu() if whole else x.sigmoid()
        answer: Tensor = self.last(self.third(x).relu())
        return answer


def test_a_group_that_the_proof_rejects_is_named_and_can_be_left_out(tmp_path, capsys) -> None:
    model, file = Comparing().eval(), tmp_path / "table.json"
    own = tmp_path / "own.py"
    text = FILE.format(tests=str(Path(__file__).parent))
    own.write_text(f"{text}\nfrom test_sensitivity_tables import Comparing")
    graph = prunus.trace(model, DATA[0])
    prunus.planner.search.sensitivity(graph, model, Closeness(model), path=file)
    asked = ["shrink", f"{own}:Comparing", "--sensitivity", str(file), "--macs", "0.7", "--json"]
    assert main(asked) == 3
    assert "second.weight[0]: kept whole" in capsys.readouterr().err
    assert main([*asked, "--exclude", "second.weight[0]"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["certificate"]["verdict"] == "exact"
    assert document["stages"][1]["macs"] <= 0.7 * document["stages"][0]["macs"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--scope", "global", "--macs", "0.5"], 2, "--scope can't be combined with --sens"),
        (["--ratios", "a.*=0.5", "--drop", "1"], 2, "--ratios, --drop can't be combined"),
        (["--round-to", "4", "--macs", "0.5"], 2, "--round-to can't be combined"),
        (["--latency", "0.5"], 2, "--latency can't be combined"),
        (["--macs", "0.5", "--importance", "l1"], 2, "of the importance l2, and this plan of l1"),
        ([], 2, "nothing says how much to remove"),
        (["--macs", "0.001"], 3, "the largest ratios leave"),
    ],
)
def test_what_contradicts_a_table_is_refused(own, bench, tmp_path, capsys, options, code, said):
    graph, model, metric = bench
    file = tmp_path / "table.json"
    prunus.planner.search.sensitivity(graph, model, metric, path=file, ratios=[0.5])
    for verb in (["plan", "--dry-run"], ["shrink"]):
        assert main([*verb, f"{own}:net", "--sensitivity", str(file), *options]) == code
        assert said in capsys.readouterr().err


def test_a_file_that_is_no_table_of_this_model_is_refused(own, bench, tmp_path, capsys) -> None:
    graph, model, metric = bench
    file = tmp_path / "table.json"
    prunus.planner.search.sensitivity(graph, model, metric, path=file, ratios=[0.5])
    other = tmp_path / "other.json"
    document = json.loads(file.read_text())
    document["groups"][0]["units"] = 13
    other.write_text(json.dumps(document))
    for verb in (["plan", "--dry-run"], ["shrink"]):
        asked = [*verb, f"{own}:net", "--macs", "0.5", "--sensitivity"]
        assert main([*asked, str(other)]) == 2
        assert "the model has no such group" in capsys.readouterr().err
        assert main([*asked, own]) == 2
        assert "is no table of sensitivities" in capsys.readouterr().err
        assert main([*asked, str(tmp_path / "nowhere.json")]) == 2
        assert "there is no file" in capsys.readouterr().err
    asked = ["plan", f"{own}:net", "--macs", "0.5", "--sensitivity", str(file)]
    assert main([*asked, "--out", str(file)]) == 2
    assert "--out and --sensitivity are one file" in capsys.readouterr().err
