"""Latency budgets: met by a made-up clock that reads widths, every refusal, and the real clocks.

No test compares real times: the timers here are functions of a model's widths.
"""

from __future__ import annotations

import copy
import json
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cli import main
from prunus.errors import BudgetError, ModelError, PlanError
from prunus.graph.budget import seconds
from prunus.planner import clocks
from prunus.planner.clocks import Clock

IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions; the second is the widest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 96, 3, padding=1)
        self.norm = nn.BatchNorm2d(96)
        self.second = nn.Conv2d(96, 160, 3, padding=1)
        self.third = nn.Conv2d(160, 96, 3, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.third(torch.relu(self.second(x)))).mean((2, 3)))

    def encode(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def timer(step: int = 1, fixed: float = 0.0) -> Callable[[nn.Module], float]:
    """Seconds of the convolutions, whose widths a kernel takes in steps, and what never shrinks."""

    def measure(model: nn.Module) -> float:
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        widths = [(m.in_channels, -(-m.out_channels // step) * step) for m in convs]
        return 1e-6 * (sum(a * b for a, b in widths) + fixed)

    return measure


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def plan_of(net: nn.Module, latency: Any, measure: Any, **options: Any) -> prunus.Plan:
    bounds = {name: options.pop(name) for name in ("params", "macs") if name in options}
    budget = prunus.Budget(latency=latency, timer=measure, **bounds)
    return prunus.plan(prunus.trace(net, IMAGES), net, budget=budget, **options)


def share_of(net: nn.Module, plan: prunus.Plan, measure: Any) -> float:
    return measure(prunus.apply(plan, copy.deepcopy(net))) / measure(net)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]


# What is met.


@pytest.mark.parametrize(
    ("step", "wanted", "scope"),
    [(1, 0.75, "local"), (1, 0.5, "global"), (1, 0.2, "local"), (8, 0.7, "global"),
     (16, 0.5, "local")],
)  # fmt: skip
def test_the_time_is_met_by_the_clock(net, step, wanted, scope) -> None:
    measure = timer(step)
    plan = plan_of(net, wanted, measure, scope=scope)
    assert 0.93 * wanted <= share_of(net, plan, measure) <= 1.02 * wanted
    found = plan.origin["latency"]
    assert found["ratio"] == pytest.approx(share_of(net, plan, measure))
    assert found["dense_ms"] == pytest.approx(1e3 * measure(net))
    assert found["clock"].endswith("measure")
    assert found["rounds"] == 2
    assert found["spread"] == 0


@pytest.mark.parametrize("step", [1, 16])
def test_of_the_plans_that_meet_the_time_the_one_that_retains_most_is_taken(net, step) -> None:
    plan = plan_of(net, 0.57, timer(step), scope="global")
    found = plan.origin["latency"]
    meeting = [trial for trial in found["trials"] if trial["ratio"] <= 0.57 * 1.02]
    assert {trial["multiple"] for trial in meeting} == {1, 8, 16, 32}
    assert found["retained"] == max(trial["retained"] for trial in meeting)
    assert plan.origin["retained"] == found["retained"]
    assert plan.origin["round_to"] == found["multiple"]
    assert plan.origin["bound"] is None
    for choice in plan.groups:
        assert (choice.size - len(choice.removed)) % found["multiple"] == 0


def test_where_time_steps_the_widths_are_multiples_of_the_step(net) -> None:
    assert plan_of(net, 0.57, timer(1)).origin["latency"]["multiple"] == 1
    assert plan_of(net, 0.65, timer(16)).origin["latency"]["multiple"] == 16


def test_with_data_the_one_of_least_error_after_repair_is_taken(net) -> None:
    data, measure = batches(), timer(16)
    plan = plan_of(net, 0.65, measure, data=iter(data))
    found = plan.origin["latency"]
    errors = [trial["error"] for trial in found["trials"] if trial["error"] is not None]
    assert len(errors) >= 2
    assert found["error"] == min(errors) < max(errors)
    budget = prunus.Budget(latency=0.65, timer=measure)
    small = prunus.shrink(net, IMAGES, data=data, budget=budget)
    assert small.plan.keep == plan.keep
    kept = [step.error for step in small.recovery if step.kept]
    assert kept[-1] == pytest.approx(found["error"], rel=1e-3)


def test_widths_that_the_caller_rounds_are_searched_alone(net) -> None:
    plan = plan_of(net, 0.5, timer(), round_to=4)
    assert {trial["multiple"] for trial in plan.origin["latency"]["trials"]} == {None}
    assert all(choice.size % 4 == len(choice.removed) % 4 == 0 for choice in plan.groups)
    assert plan.origin["round_to"] == 4


def test_fixed_ratios_and_held_groups_stay_so(net) -> None:
    graph = prunus.trace(net, IMAGES)
    first, second, third = (group.name for group in graph.groups)
    plan = plan_of(net, 0.6, timer(16), ratios={first: 0.25}, hold=[second])
    lost = {choice.name: len(choice.removed) for choice in plan.groups}
    assert (lost[first], lost[second]) == (24, 0)
    assert lost[third] > 0


def test_a_time_is_read_as_a_part_of_the_dense_one(net) -> None:
    measure = timer()
    plan = plan_of(net, f"{600 * measure(net):.6f}ms", measure)
    assert share_of(net, plan, measure) == pytest.approx(0.6, rel=0.03)
    assert not plan_of(net, "3s", measure).keep


def test_the_other_bounds_hold_as_well(net) -> None:
    measure = timer()
    plan = plan_of(net, 0.9, measure, params=0.3)
    assert plan.cost("params").share <= 0.3
    assert share_of(net, plan, measure) <= 0.9
    assert len(plan.origin["latency"]["trials"]) == 4
    tight = plan_of(net, 0.4, measure, params=0.9, macs=0.9)
    assert share_of(net, tight, measure) == pytest.approx(0.4, rel=0.03)


def test_the_same_call_gives_the_same_plan_which_is_plain_data(net) -> None:
    one, two = (plan_of(net, 0.6, timer(8), scope="global").to_json() for _ in range(2))
    assert json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def test_a_timer_gets_models_in_eval_mode(net) -> None:
    modes = set()

    def measure(model: nn.Module) -> float:
        modes.add(model.training)
        return timer()(model)

    plan_of(net.train(), 0.6, measure)
    assert modes == {False}
    assert net.training


def test_shrink_takes_a_latency_budget(net) -> None:
    measure, dense = timer(), copy.deepcopy(net)
    small = prunus.shrink(net, IMAGES, budget=prunus.Budget(latency=0.6, timer=measure))
    assert small.certificate is not None
    assert small.certificate.verdict == "exact"
    assert measure(net) / measure(dense) == pytest.approx(0.6, rel=0.03)


def test_another_way_into_the_model_is_what_is_timed(net) -> None:
    graph = prunus.trace(net, IMAGES, forward_fn="encode")
    shapes = set()

    def measure(model: nn.Module) -> float:
        shapes.add(len(model(IMAGES).shape))
        return timer()(model)

    budget = prunus.Budget(latency=0.7, timer=measure)
    prunus.plan(graph, net, budget=budget)
    assert shapes == {4}
    assert "forward" not in vars(net)


# What can't be met, and timers that misbehave: the model stays as it was, byte by byte.


def state(net: nn.Module) -> Any:
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return tensors, [m.training for m in net.modules()], set(vars(net))


def assert_untouched(net: nn.Module, before: Any) -> None:
    tensors, modes, attributes = state(net)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in tensors.items())
    assert (modes, attributes) == before[1:]


def test_a_time_out_of_reach_is_refused_with_the_fastest_that_can_be_had(net) -> None:
    measure, before = timer(fixed=50_000.0), state(net)
    with pytest.raises(BudgetError, match=r"no plan takes 50\.0% of the dense model's") as caught:
        plan_of(net, 0.5, measure, min_width=4)
    fastest = re.search(r"plans takes ([0-9.]+)%", str(caught.value))
    assert fastest is not None
    floor = plan_of(net, (float(fastest[1]) + 0.5) / 100, measure, min_width=4)
    assert share_of(net, floor, measure) > 0.6
    assert "min_width" in str(caught.value)
    assert_untouched(net, before)


def test_bounds_that_floors_forbid_are_refused_before_anything_is_timed(net) -> None:
    def measure(model: nn.Module) -> float:
        raise AssertionError("nothing can be timed")

    with pytest.raises(BudgetError, match="and params ≤"):
        plan_of(net, 0.5, measure, params=0.01, min_width=60)


@pytest.mark.parametrize(
    "wrong", [math.nan, math.inf, -1.0, 0.0, None, "1 ms", True, torch.tensor(1.0), [0.1]]
)
def test_a_timer_that_returns_no_time_is_refused(net, wrong) -> None:
    before = state(net)
    with pytest.raises(PlanError, match="no positive number of seconds") as caught:
        plan_of(net, 0.5, lambda model: wrong)
    assert "lambda" in str(caught.value)
    assert_untouched(net, before)


@pytest.mark.parametrize("call", [1, 2, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_a_timer_raises_comes_out_and_leaves_the_model_alone(net, call, error) -> None:
    calls = []

    def measure(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == call:
            raise error("the device is gone")
        return timer()(model)

    net.train()
    before = state(net)
    with pytest.raises(error, match="the device is gone"):
        prunus.shrink(net, IMAGES, budget=prunus.Budget(latency=0.5, timer=measure))
    assert_untouched(net, before)


def test_a_timer_may_do_what_it_likes_with_its_copy(net) -> None:
    before, usual = state(net), plan_of(net, 0.6, timer())

    def ruin(model: nn.Module) -> float:
        found = timer()(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.half().forward = None
        return found

    assert plan_of(net, 0.6, ruin).keep == usual.keep
    assert_untouched(net, before)


def test_no_more_than_two_copies_are_alive(net) -> None:
    alive: dict[int, Any] = {}
    most = 0

    def measure(model: nn.Module) -> float:
        nonlocal most
        assert model is not net
        alive[id(model)] = weakref.ref(model)
        most = max(most, sum(one() is not None for one in alive.values()))
        return timer(16)(model)

    plan_of(net, 0.65, measure, data=batches())
    assert most == 2


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.0, "costs nothing"),
        (math.nan, "not finite"),
        (1.5, "more than all of it"),
        (12, "seconds as well as milliseconds"),
        (True, "it is a bool"),
        ("12", "no positive number with a unit"),
        ("0ms", "it is zero"),
        ("3 minutes", "no positive number with a unit"),
    ],
)
def test_a_bad_latency_budget_is_refused(value, why) -> None:
    with pytest.raises(BudgetError, match=why) as caught:
        prunus.Budget(latency=value)
    assert "12ms" in str(caught.value)


def test_times_are_read() -> None:
    times = [seconds(text) for text in ("1.5s", "2ms", ".25 us", "3µs", "7ns")]
    assert times == pytest.approx([1.5, 2e-3, 2.5e-7, 3e-6, 7e-9])


def test_what_no_clock_can_do_is_refused(net) -> None:
    graph = prunus.trace(net, IMAGES)
    with pytest.raises(BudgetError, match="timer='tpu' is no clock"):
        prunus.Budget(latency=0.5, timer="tpu")
    with pytest.raises(BudgetError, match="no bound on latency"):
        prunus.Budget(macs=0.5, timer=timer())
    with pytest.raises(BudgetError, match="no cost that can be counted"):
        prunus.Budget(latency=0.5).limits(graph)
    with torch.device("meta"):
        nowhere = Net().eval()
    budget = prunus.Budget(latency=0.5)
    with pytest.raises(ModelError, match="meta device"):
        prunus.plan(prunus.trace(nowhere, IMAGES.to("meta")), nowhere, budget=budget)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    graph = prunus.trace(model, torch.randn(1, 5, 8))
    with pytest.raises(PlanError, match="can't be combined with dropping blocks"):
        prunus.plan(graph, model, budget=budget, drop=["layers.1"])


def test_a_budget_says_its_timer() -> None:
    assert repr(prunus.Budget(latency=0.5)) == "Budget(latency=0.5)"
    assert repr(prunus.Budget(latency=0.5, timer="onnxruntime")).endswith("timer=onnxruntime)")
    assert prunus.Budget(latency=0.5, macs=0.5, timer=timer()).counted == prunus.Budget(macs=0.5)


# The race, on made-up seconds; and the real clocks: that they run, not how fast.


def race_on(net: Net, monkeypatch: Any, wanted: float | None, *noise: float) -> clocks.Race:
    """Of a plan at 0.6 of the time, where one forward after the other is slowed down so much."""
    plan, calls = plan_of(net, 0.6, timer()), [0]

    def prepare(_: Clock, model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            calls[0] += 1
            return timer()(model) * noise[calls[0] % len(noise)]

        return run

    monkeypatch.setattr(Clock, "_prepare", prepare)
    return Clock("eager", net, ((IMAGES,), {})).compare(plan, wanted)


def test_a_quiet_race_ends_early_and_a_noisy_one_goes_on(net, monkeypatch) -> None:
    quiet = race_on(net, monkeypatch, None, 1.0)
    assert (quiet.rounds, quiet.spread) == (5, 0)
    rough = np.random.default_rng(0).lognormal(0.0, 0.1, 997).tolist()
    noisy = race_on(net, monkeypatch, None, *rough)
    assert noisy.rounds == 45
    assert noisy.spread > clocks.PRECISE
    assert noisy.ratio == pytest.approx(quiet.ratio, rel=0.05)
    assert race_on(net, monkeypatch, 0.2, *rough).rounds < 20  # far off is seen early


def test_drifts_and_outliers_cancel(net, monkeypatch) -> None:
    quiet = race_on(net, monkeypatch, None, 1.0)
    drift = [1 + 0.5 * math.sin(n / 40) + 5 * (n % 29 == 0) for n in range(1, 251)]
    assert race_on(net, monkeypatch, None, *drift).ratio == pytest.approx(quiet.ratio, rel=0.02)


@pytest.mark.parametrize("clock", ["eager", "onnxruntime"])
def test_the_built_in_clocks_run(net, clock) -> None:
    if clock == "onnxruntime":
        pytest.importorskip("onnxruntime")

    class Odd(Net):
        def forward(self, x: dict[str, Tensor], twice: bool = False) -> dict[str, Any]:
            y = super().forward(x["image"].mul_(1.0))
            return {"logits": y + y if twice else y, "note": "text"}

    model = Odd().train()
    given = {"image": IMAGES.clone()}
    graph = prunus.trace(model, (given,), {"twice": True})
    before = state(model)
    half = prunus.plan(graph, model, budget=prunus.Budget(macs=0.2))
    race = Clock(clock, model, ((given,), {"twice": True})).compare(half, None)
    assert 0 < race.ratio < math.inf
    assert race.dense > 0
    assert 5 <= race.rounds <= 45
    assert_untouched(model, before)


def test_onnxruntime_says_what_it_cannot_export(capfd) -> None:
    pytest.importorskip("onnxruntime")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(self.linear(x))

    with pytest.raises(ModelError, match="can't be run by ONNX Runtime"):
        Clock("onnxruntime", Odd().eval(), ((torch.randn(1, 4),), {}))
    assert not capfd.readouterr().out


# The command line.


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The built-in clocks count widths; how many threads PyTorch had when they did."""
    threads: list[int] = []

    def prepare(_: Clock, model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            threads.append(torch.get_num_threads())
            return timer(16)(model)

        return run

    monkeypatch.setattr(Clock, "_prepare", prepare)
    return threads


@pytest.mark.parametrize("verb", ["plan", "shrink"])
def test_the_command_line_meets_a_time(verb, tmp_path, capsys, made_up) -> None:
    file = tmp_path / "net.py"
    file.write_text("from tests.test_latency import Net\n\n\ndef build():\n    return Net()\n")
    model = [f"{file}:build", "--input-shape", "1,3,8,8"]
    flags = ["--latency", "0.6", "--backend", "onnxruntime", "--threads", "2"]
    before = torch.get_num_threads()
    assert main([verb, *model, *flags, "--out", str(tmp_path / "out")]) == 0
    assert "by the clock onnxruntime" in " ".join(capsys.readouterr().out.split())
    assert set(made_up) == {2}
    assert torch.get_num_threads() == before
    assert main([verb, *model, "--latency", "0.0001", "--out", str(tmp_path / "out")]) == 3
    assert "the fastest of" in " ".join(capsys.readouterr().err.split())
    assert main([verb, *model, "--latency", "soon", "--out", str(tmp_path / "out")]) == 2
