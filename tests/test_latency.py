"""Latency: tables from a made-up clock, plans that meet a time by it, and every refusal.

Nothing here looks at a real clock: a made-up machine counts what it is given to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cli import main
from prunus.errors import BudgetError, FormatError, ModelError, PlanError
from prunus.graph.budget import picoseconds
from prunus.latency import measuring, race
from prunus.latency.cache import Cache
from prunus.latency.eager import Eager
from prunus.latency.measuring import make_backend
from prunus.latency.operators import Operator, find_invocations
from prunus.latency.samples import Samples, choose_widths
from prunus.planner import latency_planning

OVERHEAD = 400.0
"""Nanoseconds of every operator, whatever it does."""


class Machine:
    """Takes a nanosecond for 64 products, of widths rounded up to ``step``, and for 16 numbers.

    The whole model takes ``wrong`` times what its layers would, beyond ``apart``, which shrinks
    as its layers' time does below ``shrinking_from``.
    """

    name = "made-up"
    version = "1"
    weights_mb = 16

    def __init__(self, step: int = 1, wrong: float = 1.0, apart: float = 3000.0) -> None:
        self.device = torch.device("cpu")
        self.step, self.wrong, self.apart = step, wrong, apart
        self.shrinking_from: float | None = None
        self.now = 0.0
        self.asked: list[str] = []
        self.unable: tuple[str, ...] = ()

    def absorbs(self, before: str, name: str) -> bool:
        return False

    def time_points(self, points: Any, rounds: int) -> tuple[list[float], dict[str, str]]:
        self.asked += [point.operator.key for point in points]
        refused = {
            p.operator.key: "no such kernel" for p in points if p.operator.name in self.unable
        }
        return [self.time(point.operator, point.widths) for point in points], refused

    def time(self, operator: Operator, widths: tuple[int, ...]) -> float:
        if operator.factors is None:
            return OVERHEAD + operator.count_elements(widths) / 16
        up = [math.ceil(width / self.step) * self.step for width in widths]
        fixed = prod_of_fixed(operator)
        return OVERHEAD + fixed * math.prod(up[n] for n in operator.factors) / 64

    def prepare(self, model: nn.Module, args: Any, kwargs: Any) -> Callable[[], None]:
        assert not any(module.training for module in model.modules())
        graph = prunus.trace(model, args, kwargs)
        invocations, labels = find_invocations(graph, "float32", self.absorbs)
        full = [len(label) for label in labels]
        taken = sum(self.time(i.operator, tuple(full[dim] for dim in i.dims)) for i in invocations)

        left = taken / (self.shrinking_from or taken)

        def run() -> None:
            self.now += self.apart * left + self.wrong * taken

        return run

    def take(self, run: Callable[[], None]) -> float:
        before = self.now
        run()
        return self.now - before


def prod_of_fixed(operator: Operator) -> int:
    """Products of a contraction beside those of its widths."""
    args, out = operator.document["args"], operator.document["out"][0]
    outside = math.prod(size for size in out if isinstance(size, int))
    weight = args.get("weight", args.get("mat2"))["shape"]
    inside = weight[2:] if "weight" in args else weight[:1]
    fixed = math.prod(size for size in inside if isinstance(size, int))
    return outside * fixed * (3 if "weight" in args and 3 in weight[1:2] else 1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(measuring, "make_backend", lambda name, model: made)
    monkeypatch.setattr(race, "stopwatch", lambda device: made.take)
    return made


class Net(nn.Module):
    """Convolutions, a norm, an activation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 48, 3, padding=1)
        self.last = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def table_of(net: nn.Module, tmp_path: Path, **options: Any) -> prunus.latency.LatencyTable:
    return prunus.latency.measure(net, IMAGES, folder=tmp_path, **options)


# Measuring, and what is kept of it.


def test_what_was_measured_once_is_read_from_disk(net, machine, tmp_path) -> None:
    first = table_of(net, tmp_path)
    assert machine.asked
    machine.asked.clear()
    second = table_of(net, tmp_path)
    assert not machine.asked
    assert first.dense_ns == second.dense_ns
    graph = prunus.trace(net, IMAGES)
    full = first.predict(graph).full
    assert first.predict(graph).time(full) == second.predict(graph).time(full)


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    net, machine, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(measuring, "_TOGETHER", 1)
    done: list[int] = []

    def stop(count: int, whole: int) -> None:
        done.append(whole)
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table_of(net, tmp_path, progress=stop)
    before = set(machine.asked)
    machine.asked.clear()
    table_of(net, tmp_path)
    assert len(before) == 2
    assert not before & set(machine.asked)
    assert len(before) + len(set(machine.asked)) == done[0]


def test_another_model_measures_only_what_is_new(net, machine, tmp_path) -> None:
    table_of(net, tmp_path)
    machine.asked.clear()
    wider = Net()
    wider.last = nn.Linear(48, 7)
    table_of(wider.eval(), tmp_path)
    assert {json.loads(key)["target"] for key in machine.asked} == {"aten.addmm.default"}


def test_the_file_is_json_with_the_signature_of_the_machine(net, machine, tmp_path) -> None:
    table_of(net, tmp_path)
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert document["signature"]["backend"] == "made-up"
    assert document["signature"]["threads"] == torch.get_num_threads()
    assert len(document["operators"]) == len({*machine.asked})


def test_another_number_of_threads_or_version_has_a_file_of_its_own(net, machine, tmp_path) -> None:
    table_of(net, tmp_path)
    machine.version = "2"
    machine.asked.clear()
    table_of(net, tmp_path)
    assert machine.asked
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-3],
        lambda text: text.replace('"threads"', '"thread"'),
        lambda text: "[]",
        lambda text: text.replace('"prunus_latency": 1', '"prunus_latency": 2'),
        lambda text: json.dumps(
            {**json.loads(text), "operators": {"aten.relu.default": [[3, -1.0]]}}
        ),
        lambda text: json.dumps({**json.loads(text), "operators": {"a": [["x", 1.0]]}}),
    ],
)
def test_a_damaged_file_is_refused(net, machine, tmp_path, damage) -> None:
    table_of(net, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    with pytest.raises(FormatError, match="this is no latency table") as caught:
        table_of(net, tmp_path)
    assert "delete the file" in str(caught.value)


def test_two_writers_keep_what_the_other_has_added(machine, tmp_path) -> None:
    one, other = Cache(tmp_path, machine), Cache(tmp_path, machine)
    one.store({"a": {(4,): 1.0}})
    other.store({"b": {(4,): 2.0}})
    assert Cache(tmp_path, machine).times == {"a": {(4,): 1.0}, "b": {(4,): 2.0}}


def test_an_operator_that_cannot_run_alone_counts_as_fixed(net, machine, tmp_path) -> None:
    machine.unable = ("relu",)
    table = table_of(net, tmp_path)
    assert set(table.unmeasured.values()) == {"no such kernel"}
    prediction = table.predict(prunus.trace(net, IMAGES))
    assert "relu" not in {i.operator.name for i in prediction.invocations}
    assert prediction.time(prediction.full) == pytest.approx(table.dense_ns)


def test_the_model_is_left_as_it_was(machine, tmp_path) -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table_of(net, tmp_path)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# What the samples say of any width.


def operator_of(net: nn.Module, name: str) -> Operator:
    graph = prunus.trace(net, IMAGES)
    invocations, _ = find_invocations(graph, "float32", lambda before, name: False)
    return next(i.operator for i in reversed(invocations) if i.operator.name == name)


def samples_of(operator: Operator, machine: Machine) -> Samples:
    return Samples(operator, {w: machine.time(operator, w) for w in choose_widths(operator)})


@pytest.mark.parametrize("step", [1, 4, 8])
def test_the_step_of_a_staircase_is_found(net, step) -> None:
    samples = samples_of(operator_of(net, "convolution"), Machine(step))
    assert samples.operator.full == (32, 48)
    assert samples.steps == (step, step)


@pytest.mark.parametrize("step", [1, 8])
def test_between_samples_time_is_that_of_the_next_step(net, step) -> None:
    machine = Machine(step)
    operator = operator_of(net, "convolution")
    samples = samples_of(operator, machine)
    for widths in [(32, 48), (32, 47), (17, 20), (8, 9), (30, 33)]:
        assert samples.time(widths) == pytest.approx(machine.time(operator, widths), rel=0.05)


def test_time_never_grows_while_units_go(net) -> None:
    samples = samples_of(operator_of(net, "relu"), Machine())
    times = [samples.time([width]) for width in range(samples.operator.full[0], 0, -1)]
    assert times == sorted(times, reverse=True)


def test_the_fitted_polynomial_is_exact_at_its_widths_and_never_negative(net) -> None:
    samples = samples_of(operator_of(net, "convolution"), Machine(8))
    for widths in [(32.0, 48.0), (16.0, 24.0), (3.0, 10.0)]:
        fit = samples.fit(widths)
        value = sum(c * math.prod(widths[n] for n in letters) for letters, c in fit.items())
        assert value == pytest.approx(samples.time(widths))
        assert all(constant > 0 for constant in fit.values())


def test_the_order_of_units_in_a_label_makes_no_other_width(tmp_path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    graph = prunus.trace(layer, torch.randn(1, 5, 16))
    invocations, _ = find_invocations(graph, "float32", lambda before, name: False)
    for invocation in invocations:
        if invocation.operator.name == "addmm":
            args = invocation.operator.document["args"]
            assert args["mat1"]["shape"][-1] == args["mat2"]["shape"][0]


# Plans.


def ratio_by(machine: Machine, net: nn.Module, plan: prunus.Plan) -> float:
    """What the made-up machine takes for the cut model, as a part of the dense one's."""
    times = []
    for model in (net, prunus.apply(plan, _copy(net))):
        before = machine.now
        machine.prepare(model.eval(), (IMAGES,), {})()
        times.append(machine.now - before)
    return times[1] / times[0]


def _copy(net: nn.Module) -> nn.Module:
    twin = Net()
    twin.load_state_dict(net.state_dict())
    return twin.eval()


@pytest.mark.parametrize("wrong", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_plan_meets_a_part_of_the_dense_time(net, machine, tmp_path, wrong, share) -> None:
    machine.wrong = wrong
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    plan = prunus.plan(
        graph, net, budget=prunus.Budget(latency=share), latency=table, scope="global"
    )
    assert ratio_by(machine, net, plan) == pytest.approx(share, rel=0.05)
    assert plan.origin["latency"]["ratio"] == pytest.approx(ratio_by(machine, net, plan))
    assert plan.cost("latency_ns").share == pytest.approx(share, rel=0.05)
    assert plan.origin["budget"] == {"latency": share}


def test_a_plan_meets_an_absolute_time(net, machine, tmp_path) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    budget = prunus.Budget(latency=f"{0.6 * table.dense_ns:.3f}ns")
    plan = prunus.plan(graph, net, budget=budget, latency=table)
    assert ratio_by(machine, net, plan) == pytest.approx(0.6, rel=0.05)


def test_a_time_that_the_dense_model_keeps_removes_nothing(net, machine, tmp_path) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    plan = prunus.plan(graph, net, budget=prunus.Budget(latency="1s"), latency=table)
    assert not plan.keep


def test_other_bounds_hold_as_well(net, machine, tmp_path) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    budget = prunus.Budget(latency=0.8, params=0.4)
    plan = prunus.plan(graph, net, budget=budget, latency=table)
    assert plan.cost("params").share <= 0.4
    assert ratio_by(machine, net, plan) <= 0.8 * 1.02


def test_the_same_table_gives_the_same_plan(net, machine, tmp_path) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    plans = [
        prunus.plan(graph, net, budget=prunus.Budget(latency=0.6), latency=table).to_json()
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_rounding_is_learned_from_the_table(net, machine, tmp_path) -> None:
    machine.step = 8
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    assert table.predict(graph).step == 8
    plan = prunus.plan(
        graph, net, budget=prunus.Budget(macs=0.5), round_to="latency", latency=table
    )
    assert {len(kept) % 8 for kept in plan.keep.values()} == {0}
    assert plan.origin["round_to"] == "latency"


def test_other_plans_say_what_they_take_by_the_table(net, machine, tmp_path) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    plan = prunus.plan(graph, net, budget=prunus.Budget(macs=0.5), latency=table)
    assert plan.cost("latency_ns").share == pytest.approx(ratio_by(machine, net, plan), rel=0.05)
    assert plan.origin["latency"]["ratio"] is None


def test_shrink_takes_a_latency_budget(net, machine, tmp_path) -> None:
    table = table_of(net, tmp_path)
    small = prunus.shrink(net, IMAGES, budget=prunus.Budget(latency=0.6), latency=table)
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    assert small.plan.cost("latency_ns").share == pytest.approx(0.6, rel=0.05)


def test_another_way_into_the_model_is_what_is_timed(machine, tmp_path) -> None:
    class Two(Net):
        def encode(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(torch.relu(self.first(x))))

    net = Two().eval()
    graph = prunus.trace(net, IMAGES, forward_fn="encode")
    table = table_of(net, tmp_path, graph=graph)
    assert table.dense_ns < table_of(net, tmp_path).dense_ns
    budget = prunus.Budget(latency=0.7)
    plan = prunus.plan(graph, net, budget=budget, latency=table)
    assert plan.cost("latency_ns").share == pytest.approx(0.7, rel=0.05)
    assert "forward" not in vars(net)


# Refusals.


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.0, "costs nothing"),
        (-0.5, "costs nothing"),
        (math.nan, "not finite"),
        (1.5, "more than all of it"),
        (12, "seconds as well as milliseconds"),
        (True, "it is a bool"),
        ([0.5], "it is a list"),
        ("12", "no positive number with a unit"),
        ("0ms", "it is zero"),
        ("-3ms", "no positive number with a unit"),
        ("3 minutes", "no positive number with a unit"),
    ],
)
def test_a_bad_latency_budget_is_refused(value, why) -> None:
    with pytest.raises(BudgetError, match=why) as caught:
        prunus.Budget(latency=value)
    assert "12ms" in str(caught.value)


def test_times_are_read_exactly() -> None:
    assert [picoseconds(t) for t in ("1.5s", "2ms", ".25 us", "3µs", "7ns")] == [
        1_500_000_000_000, 2_000_000_000, 250_000, 3_000_000, 7000,
    ]  # fmt: skip


def test_a_latency_budget_without_a_table_is_refused(net) -> None:
    graph = prunus.trace(net, IMAGES)
    with pytest.raises(PlanError, match="needs a latency table") as caught:
        prunus.plan(graph, net, budget=prunus.Budget(latency=0.5))
    assert "prunus.latency.measure" in str(caught.value)
    with pytest.raises(PlanError, match='round_to="latency" needs a latency table'):
        prunus.plan(graph, net, budget=prunus.Budget(macs=0.5), round_to="latency")
    with pytest.raises(BudgetError, match="knows nothing of latency"):
        prunus.Budget(latency=0.5).limits(graph)


def test_the_table_of_another_model_is_refused(net, machine, tmp_path) -> None:
    table = table_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), tmp_path)
    graph = prunus.trace(net, IMAGES)
    with pytest.raises(PlanError, match=r"does not know \d+ of \d+ operators"):
        prunus.plan(graph, net, budget=prunus.Budget(latency=0.5), latency=table)


def test_a_time_out_of_reach_is_refused_with_what_stops_it(net, machine, tmp_path) -> None:
    machine.apart = 1e6
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    with pytest.raises(BudgetError, match=r"no plan takes 50\.0% of the dense model's") as caught:
        prunus.plan(graph, net, budget=prunus.Budget(latency=0.5), latency=table)
    assert "min_width" in str(caught.value)


def test_a_time_below_what_the_table_thinks_possible_is_met_by_the_clock(
    net, machine, tmp_path
) -> None:
    graph = prunus.trace(net, IMAGES)
    machine.apart = 0.0
    machine.prepare(net, (IMAGES,), {})()
    machine.shrinking_from, machine.apart = machine.now, 1.6 * machine.now
    table = table_of(net, tmp_path)
    prediction = table.predict(graph)
    assert prediction.fixed_ns > 0.6 * table.dense_ns
    plan = prunus.plan(graph, net, budget=prunus.Budget(latency=0.5), latency=table)
    assert ratio_by(machine, net, plan) == pytest.approx(0.5, rel=0.05)


def test_solutions_that_miss_their_target_again_and_again_are_aimed_off_it(
    net, machine, tmp_path, monkeypatch
) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    solve = latency_planning._solve

    def below(g: Any, others: Any, prediction: Any, target: float, *rest: Any) -> Any:
        return solve(g, others, prediction, target - 0.06, *rest)

    monkeypatch.setattr(latency_planning, "_solve", below)
    plan = prunus.plan(graph, net, budget=prunus.Budget(latency=0.6), latency=table)
    assert ratio_by(machine, net, plan) == pytest.approx(0.6, rel=0.03)


def test_a_race_that_was_disturbed_is_run_again(net, machine, tmp_path, monkeypatch) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    races: list[np.ndarray[Any, Any]] = []

    def disturb(*args: Any) -> Any:
        times = race.race(*args)
        if len(races) % 2 == 0:
            times[:, 1:] *= 2
        races.append(times)
        return times

    monkeypatch.setattr("prunus.planner.latency_planning.race", disturb)
    plan = prunus.plan(graph, net, budget=prunus.Budget(latency=0.6), latency=table)
    assert ratio_by(machine, net, plan) == pytest.approx(0.6, rel=0.05)
    assert len(races) == 2 * plan.origin["latency"]["measurements"]


def test_a_clock_that_agrees_with_no_plan_is_refused(net, machine, tmp_path, monkeypatch) -> None:
    graph, table = prunus.trace(net, IMAGES), table_of(net, tmp_path)
    times = np.tile([1000.0, 990.0, 1000.0], (15, 1))
    monkeypatch.setattr("prunus.planner.latency_planning.race", lambda *args: times)
    with pytest.raises(BudgetError, match="by the clock") as caught:
        prunus.plan(graph, net, budget=prunus.Budget(latency=0.5), latency=table)
    assert "99.0%" in str(caught.value)


def test_blocks_and_a_latency_budget_are_not_combined(machine, tmp_path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    tokens = torch.randn(1, 5, 8)
    graph = prunus.trace(model, tokens)
    with pytest.raises(PlanError, match="can't be combined with dropping blocks"):
        prunus.plan(graph, model, budget=prunus.Budget(latency=0.9), drop=["layers.1"])


def test_measure_refuses_what_it_cannot_measure(net) -> None:
    with pytest.raises(ModelError, match="backend='tpu' is none of 'eager'"):
        prunus.latency.measure(net, IMAGES, backend="tpu")
    with pytest.raises(PlanError, match="rounds=0"):
        prunus.latency.measure(net, IMAGES, rounds=0)
    with torch.device("meta"):
        nowhere = Net()
    with pytest.raises(ModelError, match="meta device"):
        prunus.latency.measure(nowhere, IMAGES)


def test_a_missing_compiler_is_told(net, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=r"no C\+\+ compiler"):
        make_backend("compile", net)


# The backends themselves, one round of each: that they run, not how fast.


class Everything(nn.Module):
    """An operator of each kind that backends treat in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.other = nn.BatchNorm2d(8)
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = self.other(self.deep(x) + x)
        return self.head(self.attend(x.flatten(2).transpose(1, 2)))


SMALL = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def everything() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


def test_eager_runs_every_operator(everything, tmp_path) -> None:
    table = prunus.latency.measure(everything, SMALL, rounds=1, folder=tmp_path)
    assert not table.unmeasured
    assert {"convolution", "addmm", "native_layer_norm"} <= {
        samples.operator.name for samples in table.samples.values()
    }


def test_onnxruntime_runs_every_operator_and_fuses_norms(everything, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    table = prunus.latency.measure(
        everything, SMALL, rounds=1, folder=tmp_path, backend="onnxruntime"
    )
    assert not table.unmeasured
    prediction = table.predict(prunus.trace(everything, SMALL))
    norms = [i.module for i in prediction.invocations if i.operator.name == "native_batch_norm"]
    assert norms == ["other"]


def test_onnxruntime_says_what_it_cannot_export(tmp_path, capfd) -> None:
    pytest.importorskip("onnxruntime")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(self.linear(x))

    backend = make_backend("onnxruntime", Odd())
    with pytest.raises(ModelError, match="can't be run by ONNX Runtime"):
        backend.prepare(Odd().eval(), (torch.randn(1, 4),), {})
    assert not capfd.readouterr().out


def test_compiled_operators_run(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval()
    try:
        table = prunus.latency.measure(
            net, torch.randn(2, 8), rounds=1, folder=tmp_path, backend="compile"
        )
    except ModelError as error:
        pytest.skip(str(error))
    assert not table.unmeasured
    assert len(table.samples) == 2


def test_operators_are_timed_on_the_arguments_that_they_had(everything) -> None:
    graph = prunus.trace(everything, SMALL)
    seen: dict[str, list[tuple[int, ...]]] = {}

    class Looking(Eager):
        def _function(self, operator: Operator) -> Callable[..., Any]:
            run = super()._function(operator)

            def look(*args: Any, **kwargs: Any) -> Any:
                out = run(*args, **kwargs)
                first = out[0] if isinstance(out, tuple) else out
                seen.setdefault(operator.key, []).append(tuple(first.shape))
                return out

            return look

    backend = Looking(torch.device("cpu"), 16)
    invocations, _ = find_invocations(graph, "float32", backend.absorbs)
    for operator in {i.operator.key: i.operator for i in invocations}.values():
        points = [measuring.Point(operator, operator.full)]
        times, refused = backend.time_points(points, 1)
        assert not refused
        assert times[0] > 0
        full = dict(zip("abcdefgh", operator.full, strict=False))
        wanted = tuple(full.get(size, size) for size in operator.document["out"][0])
        assert seen[operator.key] == [wanted, wanted]


# The command line.


@pytest.fixture
def source(tmp_path: Path) -> str:
    text = (
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))\n"
        "def example_inputs():\n    return torch.randn(1, 3, 16, 16)\n"
    )
    (tmp_path / "net.py").write_text(text)
    return f"{tmp_path / 'net.py'}:net"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_measure_prints_the_operators_by_their_time(source, machine, capsys) -> None:
    assert main(["measure", source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = [row["ms"] for row in found["operators"]]
    assert times == sorted(times, reverse=True)
    assert {row["name"] for row in found["operators"]} == {"convolution", "relu"}
    assert sum(times) + found["fixed_ms"] == pytest.approx(found["dense_ms"])
    assert main(["measure", source]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "made-up: " in out
    assert "Time steps at multiples of 1." in out


def test_plan_meets_a_time_from_the_command_line(source, machine, capsys) -> None:
    assert main(["plan", source, "--latency", "0.6", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["latency_ns"]["share"] == pytest.approx(0.6, rel=0.05)
    assert main(["plan", source, "--latency", "0.6", "--dry-run"]) == 0
    assert "on made-up, by the clock." in " ".join(capsys.readouterr().out.split())


def test_shrink_meets_a_time_from_the_command_line(source, machine, capsys) -> None:
    command = ["shrink", source, "--latency", "0.6", "--round-to", "latency", "--json"]
    assert main(command) == 0
    before, after = json.loads(capsys.readouterr().out)["costs"]["latency_ns"]
    assert after / before == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize("text", ["nan", "12", "0", "ms", "-1ms"])
def test_the_command_line_refuses_a_bad_time(source, capsys, text) -> None:
    assert main(["plan", source, f"--latency={text}", "--dry-run"]) == 2
    assert "is no budget" in capsys.readouterr().err
