"""Sensitivities by masked evaluation: against surgery, killed and resumed, and driving plans."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus.cli import main
from prunus.errors import BudgetError, DataError, FormatError, MissingExtraError, PlanError
from prunus.planner.search.sensitivity import Sensitivity

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A stream of eight units with two branches, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.c, self.d = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.b(self.a(x).relu())
        x = x + self.d(self.c(x).relu())
        return self.head(x)


class Closeness:
    """Minus the distance to the whole model's outputs; it counts how often it is asked."""

    def __init__(self, model: nn.Module) -> None:
        with torch.no_grad():
            self.whole = copy.deepcopy(model).eval()(X)
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return -float((model(X).detach() - self.whole).norm())


@pytest.fixture
def bench():
    model = Residual()
    return prunus.trace(model, X), model, Closeness(model)


def test_cells_are_what_surgery_gives_and_a_stream_is_one_row(bench) -> None:
    graph, model, metric = bench
    before = copy.deepcopy(model.state_dict())
    model.train()
    table = prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.25, 0.5])
    assert list(table.sizes.items()) == [
        ("stem.weight[0]", 8), ("a.weight[0]", 12), ("c.weight[0]", 10)
    ]  # fmt: skip
    assert table.dense == pytest.approx(0, abs=1e-5)
    for name in table.sizes:
        for ratio in table.ratios:
            cut = copy.deepcopy(model).eval()
            prunus.apply(prunus.plan(graph, model, ratios={name: ratio}), cut)
            assert table.value(name, ratio) == pytest.approx(metric(cut), abs=1e-4)
            assert table.value(name, ratio) < -0.01
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Shared(nn.Module):
    """Attention with two query heads a key head: query and key heads go together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.shared = 8, 4
        self.q, self.k, self.v = nn.Linear(6, 32), nn.Linear(6, 16), nn.Linear(6, 16)
        self.o = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        q = self.q(x).view(1, n, self.heads, 4)
        k, v = (y.view(1, n, self.shared, 4) for y in (self.k(x), self.v(x)))
        k, v = (y.repeat_interleave(self.heads // self.shared, 2) for y in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, self.heads * 4))


def test_groups_that_lose_units_together_are_one_row_and_still_drive_a_plan() -> None:
    model = Shared()
    graph = prunus.trace(model, X)
    table = prunus.planner.search.sensitivity(
        graph, model, Closeness(model), ratios=[0.25, 0.5], tolerance=0.5
    )
    rows = set(table.sizes)
    for name in rows:
        lone = prunus.plan(graph, model, ratios={name: 0.5})
        assert not {g.name for g in lone.groups if g.removed} & (rows - {name})
    plan = prunus.plan(graph, model, ratios=table.tolerated)
    cut = prunus.apply(plan, copy.deepcopy(model).eval())
    assert torch.isfinite(cut(X)).all()


def test_tolerated_share_is_the_largest_that_a_full_scan_finds() -> None:
    net = nn.Sequential(nn.Linear(1, 12), nn.ReLU(), nn.Linear(12, 1)).requires_grad_(False)
    net[0].weight.copy_(torch.arange(1.0, 13)[:, None])
    net[0].bias.zero_()
    net[2].weight.fill_(1.0)
    net[2].bias.zero_()
    graph = prunus.trace(net, torch.ones(1, 1))
    calls = []

    def total(model: nn.Module) -> float:
        """The sum of the weights that are left: 78 of all, and the small ones go first."""
        calls.append(1)
        return float(model(torch.ones(1, 1)))

    for tolerance, units in ((0.0, 0), (0.9, 0), (1.0, 1), (14.9, 4), (15.0, 5), (65.0, 10)):
        calls.clear()
        table = prunus.planner.search.sensitivity(
            graph, net, total, ratios=[11 / 12], tolerance=tolerance
        )
        assert table.tolerated == {"0.weight[0]": units / 12}
        assert len(calls) <= 2 + 4  # the whole, the one ratio, and a bisection of twelve
    table = prunus.planner.search.sensitivity(graph, net, total, ratios=[0.5], tolerance=1e9)
    assert table.tolerated == {"0.weight[0]": 0.5}


def test_what_is_in_the_file_is_not_measured_again(bench, tmp_path) -> None:
    graph, model, metric = bench
    path = tmp_path / "table.json"
    first = prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.25, 0.5], path=path)
    assert metric.calls == 1 + 6
    assert Sensitivity.load(path) == first
    more = prunus.planner.search.sensitivity(
        graph, model, metric, ratios=[0.25, 0.5, 0.75], path=path
    )
    assert metric.calls == 1 + 6 + 1 + 3
    again = Closeness(model)
    assert more == prunus.planner.search.sensitivity(graph, model, again, ratios=[0.25, 0.5, 0.75])


def test_a_file_of_another_run_is_refused(bench, tmp_path) -> None:
    graph, model, metric = bench
    path = tmp_path / "table.json"
    prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.5], path=path)
    with pytest.raises(FormatError, match=r"importance, calibration data or seed are not"):
        prunus.planner.search.sensitivity(
            graph, model, metric, ratios=[0.5], path=path, importance="l1"
        )
    with pytest.raises(FormatError, match=r"metric of the whole model was -?\S+ then and is 5 now"):
        prunus.planner.search.sensitivity(graph, model, lambda _: 5.0, ratios=[0.5], path=path)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(FormatError, match="weights"):
        prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.5], path=path)
    path.write_text("{}")
    with pytest.raises(FormatError, match="missing required field `format`"):
        prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.5], path=path)


SLOW = """
import time, sys
sys.path.insert(0, {tests!r})
from test_sensitivity import Residual, Closeness, X
import prunus
model = Residual()
graph = prunus.trace(model, X)
near = Closeness(model)
def metric(one):
    time.sleep(0.3)
    return near(one)
prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.25, 0.5, 0.75], path={path!r})
"""


def test_killed_and_resumed_it_is_as_if_it_had_run_through(bench, tmp_path) -> None:
    graph, model, metric = bench
    path = tmp_path / "table.json"
    code = SLOW.format(tests=str(Path(__file__).parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while process.poll() is None and not path.exists():
            time.sleep(0.05)
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    half = Sensitivity.load(path)
    done = sum(len(curve) - 1 for curve in half.curves.values())
    assert 0 < done < 9
    resumed = prunus.planner.search.sensitivity(
        graph, model, metric, ratios=[0.25, 0.5, 0.75], path=path
    )
    assert metric.calls == 1 + 9 - done
    whole = prunus.planner.search.sensitivity(graph, model, metric, ratios=[0.25, 0.5, 0.75])
    assert resumed == whole
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_drives_a_plan_within_a_budget(bench) -> None:
    graph, model, metric = bench
    table = prunus.planner.search.sensitivity(graph, model, metric)
    plan = prunus.planner.search.plan_by_sensitivity(table, graph, model, prunus.Budget(macs=0.6))
    before, after = plan.costs["macs"]
    assert 0.5 * before < after <= 0.6 * before
    cut = prunus.apply(plan, copy.deepcopy(model).eval())
    assert prunus.report.measure_costs(cut, X)["macs"] == after
    with pytest.raises(BudgetError, match="the largest ratios leave"):
        prunus.planner.search.plan_by_sensitivity(table, graph, model, prunus.Budget(macs=0.001))
    other = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match="no such group"):
        prunus.planner.search.plan_by_sensitivity(
            table, prunus.trace(other, X), other, prunus.Budget(macs=0.6)
        )


def test_curves_are_read_at_their_first_crossing() -> None:
    curve = {0: 1.0, 2: 0.8, 4: 0.9, 6: 0.0, 8: None}
    table = Sensitivity(1.0, (), {"a": 10}, {"a": curve})
    assert table.ratios_at(0.0) == {"a": 0.0}
    assert table.ratios_at(0.1)["a"] == pytest.approx(0.1)  # not the second time, at 0.4
    assert table.ratios_at(0.55)["a"] == pytest.approx(0.5)
    assert table.ratios_at(5.0) == {"a": 0.6}
    with pytest.raises(PlanError, match="loss=-1 is no loss"):
        table.ratios_at(-1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratios": []}, "there are none"),
        ({"ratios": [0.5, 1.0]}, "1.0 is not between 0 and 1"),
        ({"ratios": [float("nan")]}, "nan is not between 0 and 1"),
        ({"tolerance": float("nan")}, "tolerance=nan is no loss"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is no loss"),
        ({"include": "nowhere.*"}, "matches no group"),
        ({"exclude": "*"}, "no group can lose units"),
        ({"importance": "l3"}, "known are"),
    ],
)
def test_bad_input_is_refused_before_the_metric_is_asked(bench, options, text) -> None:
    graph, model, metric = bench
    with pytest.raises(PlanError, match=text):
        prunus.planner.search.sensitivity(graph, model, metric, **options)
    assert metric.calls == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [("good", "returned a str"), (None, "NoneType"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_a_metric_that_is_no_number_is_refused(bench, value, text) -> None:
    graph, model, _ = bench
    with pytest.raises(DataError, match=text):
        prunus.planner.search.sensitivity(graph, model, lambda _: value)
    with pytest.raises(DataError, match="needs calibration data"):
        prunus.planner.search.sensitivity(graph, model, lambda _: 1.0, importance="taylor")


def test_the_heat_map_is_drawn_and_the_same_each_time(bench, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    graph, model, metric = bench
    table = prunus.planner.search.sensitivity(
        graph, model, metric, ratios=[0.2, 0.6], tolerance=1.0
    )
    for name in ("a.png", "b.png", "c.svg"):
        prunus.report.draw_sensitivity(table, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    text = (tmp_path / "c.svg").read_text()
    assert "stem.weight[0]" in text
    assert "60%" in text


FILE = """
import sys
sys.path.insert(0, {tests!r})
from test_sensitivity import Residual, Closeness, X
def net(): return Residual()
def example_inputs(): return X
def metric(model): return Closeness(Residual())(model)
def words(model): return "good"
"""


def test_the_command_line(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "own.py", tmp_path / "table.json"
    file.write_text(FILE.format(tests=str(Path(__file__).parent)))
    asked = ["sensitivity", f"{file}:net", "--at", "0.25,0.5", "--metric"]
    own = [*asked, f"{file}:metric", "--out", str(out), "--picture", str(tmp_path / "heat.png")]
    assert main([*own, "--tolerance", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    table = Sensitivity.load(out)
    assert document["tolerated"] == table.tolerated
    assert [row["units"] for row in document["groups"]] == [8, 12, 10]
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    assert main(own) == 0
    assert "stem.weight[0]" in capsys.readouterr().out
    for wrong, text in (
        ([f"{file}:words"], "the metric returned a str"),
        ([f"{file}:metrics"], "did you mean 'metric'?"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        ([f"{file}:metric", "--tolerance", "-1"], "is no loss"),
        ([f"{file}:metric", "--out", str(file)], "--out and MODEL are one file"),
    ):
        assert main([*asked, *wrong]) == 2
        assert text in capsys.readouterr().err


def test_the_search_meets_the_budget_and_is_no_worse_than_equal_ratios(bench) -> None:
    pytest.importorskip("optuna")
    graph, model, metric = bench
    budget = prunus.Budget(macs=0.6)
    one = prunus.planner.search.search_ratios(graph, model, metric, budget=budget, trials=1)
    found = prunus.planner.search.search_ratios(graph, model, metric, budget=budget, trials=12)
    assert one.value < found.value
    assert found.trials == 12
    before, after = found.plan.costs["macs"]
    assert after <= 0.6 * before
    with prunus.mask(found.plan, model):
        assert metric(model) == found.value
    again = prunus.planner.search.search_ratios(graph, model, metric, budget=budget, trials=12)
    assert again.plan == found.plan
    assert prunus.plan(graph, model, ratios=found.ratios).keep == found.plan.keep


SEARCH = """
import sys
sys.path.insert(0, {tests!r})
from test_sensitivity import Residual, Closeness, X
import prunus
model = Residual()
found = prunus.planner.search.search_ratios(
    prunus.trace(model, X), model, Closeness(model), budget=prunus.Budget(macs=0.6),
    trials=4, storage={storage!r}, seed={seed},
)
"""


def test_processes_share_a_study(bench, tmp_path) -> None:
    pytest.importorskip("optuna")
    graph, model, metric = bench
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = {"budget": prunus.Budget(macs=0.6), "trials": 1, "storage": storage}
    prunus.planner.search.search_ratios(graph, model, metric, **first)
    tests = str(Path(__file__).parent)
    codes = [SEARCH.format(tests=tests, storage=storage, seed=seed) for seed in (1, 2)]
    running = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert [process.wait() for process in running] == [0, 0]
    found = prunus.planner.search.search_ratios(graph, model, metric, **first)
    assert found.trials == 1 + 2 * 4 + 1
    with pytest.raises(PlanError, match="the study 'prunus' asks something else"):
        prunus.planner.search.search_ratios(
            graph, model, metric, **{**first, "budget": prunus.Budget(macs=0.5)}
        )


def test_bad_searches_are_refused(bench, monkeypatch) -> None:
    pytest.importorskip("optuna")
    graph, model, metric = bench
    half = prunus.Budget(macs=0.5)
    with pytest.raises(PlanError, match="trials must be a positive integer"):
        prunus.planner.search.search_ratios(graph, model, metric, budget=half, trials=0)
    with pytest.raises(PlanError, match=r"1\.5 is not between 0 and 1"):
        prunus.planner.search.search_ratios(graph, model, metric, budget=half, max_ratio=1.5)
    with pytest.raises(BudgetError, match="allow larger ratios"):
        prunus.planner.search.search_ratios(graph, model, metric, budget=half, max_ratio=0.1)
    assert metric.calls == 0
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"prunus\[search\]"):
        prunus.planner.search.search_ratios(graph, model, metric, budget=half)
