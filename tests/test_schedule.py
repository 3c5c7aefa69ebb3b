"""``prunus.Schedule``: rounds that nest and compose, budgets of the original, resume, the floor."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus import Budget, Schedule
from prunus.errors import BudgetError, PlanError
from prunus.tracer.capture import Recorder
from prunus.training.live import graph_after

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


def convolutions() -> nn.Sequential:
    """Grouped, depthwise and transposed convolutions, batch and group norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 24, 2, stride=2, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, 24), layers, nn.Linear(24, 4))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )


MODELS = {"convolutions": (convolutions, IMAGES), "encoder": (encoder, WORDS), "mlp": (mlp, WORDS)}


def train(
    model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer, steps: int = 2
) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs + 0.1 * torch.randn(inputs.shape)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("importance", ["l2", "taylor", "obs"])
def test_derived_graph_plans_what_a_trace_of_the_cut_model_plans(name, importance) -> None:
    build, inputs = MODELS[name]
    model = build().eval()
    graph = prunus.trace(model, inputs)
    first = prunus.plan(graph, model, budget=Budget(macs=0.7))
    prunus.apply(first, model)
    keep = {axis: np.asarray(stay) for axis, stay in first.keep.items()}
    derived, traced = (
        graph_after(graph, graph.mask_from_positions(keep)),
        prunus.trace(model, inputs),
    )

    assert derived.shapes == traced.shapes
    assert [(g.name, g.size) for g in derived.groups] == [(g.name, g.size) for g in traced.groups]
    for scope in ("local", "global"):
        asked = {"importance": importance, "scope": scope, "data": [inputs]}
        one, other = (
            prunus.plan(each, model, budget=Budget(params=0.6), **asked)
            for each in (derived, traced)
        )
        assert one.keep == other.keep
        assert one.costs == other.costs
        assert one.groups == other.groups
        assert set(one.edits) == set(other.edits)
        assert set(one.scalings) == set(other.scalings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", ["one_shot", "linear", "cubic", "geometric", lambda t: t**2])
def test_rounds_meet_their_budgets_and_compose_into_one_exact_plan(name, shape) -> None:
    build, inputs = MODELS[name]
    model = build().eval()
    schedule = Schedule(
        model, inputs, budget=Budget(macs=0.5), steps=3, shape=shape, verified=False
    )
    rounds = [done for epoch in range(8) if (done := schedule.step(epoch / 8)) is not None]

    assert [done.number for done in rounds] == ([1] if shape == "one_shot" else [1, 2, 3])
    shares = [done.costs["macs"].share for done in rounds]
    bounds = {
        "one_shot": [0.5],
        "linear": [1 - 0.5 / 3, 1 - 1 / 3, 0.5],
        "cubic": [1 - 0.5 * 19 / 27, 1 - 0.5 * 26 / 27, 0.5],
        "geometric": [0.5 ** (1 / 3), 0.5 ** (2 / 3), 0.5],
    }.get(shape if isinstance(shape, str) else "", [1 - 0.5 / 9, 1 - 0.5 * 4 / 9, 0.5])
    assert all(share <= bound for share, bound in zip(shares, bounds, strict=True))
    assert shares[-1] > 0.42  # and no further below than its steps are wide
    assert shares == sorted(shares, reverse=True)

    whole = build().eval()
    masked = build().eval()
    prunus.apply(schedule.plan, whole)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-6, atol=1e-7)
    with torch.no_grad(), prunus.mask(schedule.plan, masked):
        torch.testing.assert_close(model(inputs), masked(inputs), rtol=1e-5, atol=1e-5)
    alone = prunus.Plan.from_mask(
        schedule.graph,
        schedule.graph.mask_from_positions(
            {a: np.asarray(s) for a, s in schedule.plan.keep.items()}
        ),
    )
    assert alone.keep == schedule.plan.keep
    assert alone.costs == schedule.plan.costs


def test_a_round_takes_no_trace_and_optimizer_state_follows(monkeypatch) -> None:
    model = encoder()
    schedule = Schedule(model, WORDS, budget=Budget(params=0.6), steps=3)
    optimizer = torch.optim.AdamW(model.parameters())
    traces = []
    record = Recorder.__init__
    monkeypatch.setattr(
        Recorder, "__init__", lambda self, *a, **k: (traces.append(1), record(self, *a, **k))[1]
    )
    for epoch in range(4):
        train(model, WORDS, optimizer)
        schedule.step(epoch / 4, optimizer=optimizer)
    assert not traces
    assert schedule.round == 3
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_importance_of_data_and_recovery_in_every_round() -> None:
    model = convolutions()
    schedule = Schedule(
        *(model, IMAGES),
        budget=Budget(macs=0.5),
        steps=2,
        importance="obs",
        data=[IMAGES, IMAGES + 1],
        recover="auto",
    )
    rounds = [schedule.step(progress) for progress in (0, 1)]
    for done in rounds:
        assert [step.name for step in done.recovery][:2] == ["cut", "least squares"]
        kept = [step.error for step in done.recovery if step.kept]
        assert kept[-1] <= kept[0]
    assert schedule.plan.biases == {}
    fresh = prunus.apply(schedule.plan, convolutions())
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]


def test_several_due_rounds_are_done_at_once_and_an_empty_one_says_so() -> None:
    model = mlp()
    schedule = Schedule(model, WORDS, budget=Budget(macs=0.5), steps=4, span=(0.2, 0.8))
    assert schedule.step(0.1) is None
    done = schedule.step(0.65)
    assert (done.number, schedule.round) == (3, 3)
    assert schedule.step(0.65) is None
    assert schedule.step(0.8).number == 4
    assert schedule.step(1.0) is None

    idle = Schedule(mlp(), WORDS, budget=Budget(macs=0.5), steps=2, shape=lambda t: float(t == 1))
    empty = idle.step(0)
    assert (empty.removed, empty.plan, empty.note) == (
        0,
        None,
        "removed nothing: the budget is met",
    )
    assert "removed nothing" in str(empty)


def test_max_ratio_is_of_the_original_model() -> None:
    model = mlp()
    schedule = Schedule(
        *(model, WORDS), budget=Budget(macs=0.6), steps=4, scope="global", max_ratio={"0.*": 0.25}
    )
    for epoch in range(4):
        schedule.step(epoch / 4)
    assert model[0].out_features == 24


def test_part_and_globs_hold_in_every_round() -> None:
    model = encoder()
    schedule = Schedule(model, WORDS, budget=Budget(macs=0.5), part="1.layers.0", steps=2)
    schedule.step(1.0)
    changed = {axis.tensor for axis in schedule.plan.keep}
    assert changed
    assert all(name.startswith("1.layers.0.") for name in changed)


STATE = """
import sys, torch, prunus
from tests.test_schedule import run
run(sys.argv[1], stop=int(sys.argv[2]))
"""


def run(path: str, stop: int) -> None:
    """Train six epochs, from the checkpoint if there is one; stop after some."""
    model = mlp()
    schedule = Schedule(model, WORDS, budget=Budget(macs=0.4), steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = 0
    if Path(path).exists():
        saved = torch.load(path, weights_only=True)
        schedule.load_state_dict(saved["schedule"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, min(stop, 6)):
        train(model, WORDS, optimizer)
        schedule.step(epoch / 6, optimizer=optimizer)
        state = {"schedule": schedule.state_dict(), "model": model.state_dict()}
        torch.save({**state, "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, path)


def test_resume_in_a_fresh_process_equals_an_uninterrupted_run(tmp_path) -> None:
    torch.manual_seed(0)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(str(whole), stop=6)
    run(str(parts), stop=3)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STATE, str(parts), "6"]
    subprocess.run(command, check=True, env=environment)
    one, other = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert one["schedule"]["plans"] == other["schedule"]["plans"]
    assert len(one["schedule"]["plans"]) == 4
    assert one["schedule"]["round"] == other["schedule"]["round"] == 4
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name])
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"])


def test_a_state_of_another_schedule_is_refused() -> None:
    schedule = Schedule(mlp(), WORDS, budget=Budget(macs=0.5), verified=False)
    schedule.step(0)
    state = schedule.state_dict()
    other = Schedule(mlp(), WORDS, budget=Budget(macs=0.4), verified=False)
    with pytest.raises(PlanError, match=r"budget was \{'macs': 0.5\} there"):
        other.load_state_dict(state)
    with pytest.raises(PlanError, match="not the state of a Schedule"):
        other.load_state_dict({})
    pruned = Schedule(mlp(), WORDS, budget=Budget(macs=0.5), importance="random", verified=False)
    pruned.step(0)
    with pytest.raises(PlanError, match="pruned by other rounds already"):
        pruned.load_state_dict(state)
    ahead = copy.deepcopy(state)
    schedule.step(1)
    later = schedule.state_dict()
    again = Schedule(mlp(), WORDS, budget=Budget(macs=0.5), verified=False)
    again.load_state_dict(ahead)
    again.load_state_dict(later)  # from where it is
    assert again.plan == schedule.plan


def test_below_the_floor_the_last_good_model_is_put_back() -> None:
    model = mlp()
    metrics = iter([0.95, 0.93, 0.5])
    schedule = Schedule(
        *(model, WORDS), budget=Budget(macs=0.3), steps=3, floor=(lambda _: next(metrics), 0.9)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    identities = [id(parameter) for parameter in model.parameters()]
    assert schedule.step(0, optimizer=optimizer).metric == 0.95
    train(model, WORDS, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], schedule.plan))
    assert schedule.step(0.4, optimizer=optimizer).metric == 0.93
    train(model, WORDS, optimizer)
    state = schedule.state_dict()
    schedule.load_state_dict(state)  # of a later moment than the last good model's
    done = schedule.step(0.8, optimizer=optimizer)

    assert (done.number, done.restored, done.metric) == (2, True, 0.5)
    assert "below the floor 0.9" in done.note
    assert (schedule.round, schedule.stopped) == (1, True)
    assert schedule.step(1.0) is None
    assert schedule.plan == before[2]
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert model.training
    for name, value in before[0].items():
        assert torch.equal(model.state_dict()[name], value)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    train(model, WORDS, optimizer)

    fresh = mlp()  # the same after a resume between the round and its check
    again = Schedule(
        fresh, WORDS, budget=Budget(macs=0.3), steps=3, floor=0.9, evaluate=lambda _: 0.5
    )
    again.load_state_dict(state)
    assert again.step(0.8).restored
    for name, value in before[0].items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_the_last_round_is_checked_at_the_end_and_the_first_one_waits_for_the_floor() -> None:
    metrics = iter([0.2, 0.95, 0.1])
    model = mlp()
    schedule = Schedule(
        *(model, WORDS), budget=Budget(macs=0.5), shape="one_shot",
        floor=0.9, evaluate=lambda _: next(metrics),
    )  # fmt: skip
    waiting = schedule.step(0.0)
    assert waiting.note == "waiting: the metric 0.2 is below the floor 0.9"
    assert schedule.step(0.1).removed > 0
    assert schedule.step(0.5) is None
    assert schedule.step(1.0).restored
    assert model[0].out_features == 32


REFUSED = [
    ({"shape": "cubik"}, "shape='cubik' is no shape of a schedule"),
    ({"shape": lambda t: 1 - t}, "never falls and ends at 1"),
    ({"shape": lambda t: t / 2}, "never falls and ends at 1"),
    ({"steps": 0}, "steps must be a positive integer"),
    ({"span": (0.8, 0.2)}, "no pair of progresses"),
    ({"budget": 0.5}, r"budget=prunus.Budget\(macs=0.5\)"),
    ({"budget": Budget(latency=0.5)}, "no bound on latency"),
    ({"budget": None, "ratio": 0.5}, "a Schedule takes no ratio="),
    ({"remove": {"heads": 1}}, "a Schedule takes no remove="),
    ({"recover": "least_squares"}, "needs calibration data"),
    ({"floor": 0.9}, "is no floor"),
    ({"floor": ("accuracy", 0.9)}, "is no floor"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_what_a_schedule_refuses(options, text) -> None:
    with pytest.raises(prunus.PrunusError, match=text):
        Schedule(mlp(), WORDS, **{"budget": Budget(macs=0.5), **options})


def test_what_a_step_refuses() -> None:
    model = mlp()
    schedule = Schedule(model, WORDS, budget=Budget(macs=0.5), verified=False)
    for progress in (-0.1, 1.1, "half", float("nan")):
        with pytest.raises(PlanError, match="progress must be a number between 0 and 1"):
            schedule.step(progress)
    with pytest.raises(TypeError, match="did you mean 'importance'"):
        Schedule(model, WORDS, budget=Budget(macs=0.5), importence="l2")
    with pytest.raises(BudgetError):
        Schedule(model, WORDS, budget=Budget(macs=0.001))
    prunus.shrink(model, WORDS, budget=Budget(macs=0.5), recover="none")
    with pytest.raises(PlanError, match="a plan for another model"):
        schedule.step(0)
    broken = Schedule(mlp(), WORDS, budget=Budget(macs=0.5), floor=(lambda _: None, 1.0))
    with pytest.raises(PlanError, match="evaluate= returned None"):
        broken.step(0)


def test_an_error_in_a_round_changes_nothing() -> None:
    model = mlp()
    schedule = Schedule(model, WORDS, budget=Budget(macs=0.5))
    foreign = torch.optim.SGD(mlp().parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(prunus.PrunusError, match="holds none of the model's parameters"):
        schedule.step(0, optimizer=foreign)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert schedule.round == 0
    assert schedule.step(0).number == 1


@pytest.mark.parametrize("recover", ["none", "auto"])
def test_the_average_is_cut_and_put_back_along(recover) -> None:
    metrics = iter([0.95, 0.93, 0.5])
    model = mlp()
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = Schedule(
        *(model, WORDS), budget=Budget(macs=0.3), steps=2, data=[WORDS], recover=recover,
        floor=(lambda _: next(metrics), 0.9),
    )  # fmt: skip
    schedule.step(0, optimizer=optimizer, ema=ema)
    train(model, WORDS, optimizer)
    ema.update_parameters(model)
    good = copy.deepcopy((model.state_dict(), ema.module.state_dict()))
    schedule.step(0.75, optimizer=optimizer, ema=ema)
    assert model[0].out_features < len(good[0]["0.weight"])
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in model.parameters()]
    train(model, WORDS, optimizer)
    ema.update_parameters(model)
    with pytest.raises(PlanError, match="ema= was given only before or after it"):
        schedule._good.restore(model, optimizer, None)
    assert schedule.step(1.0, optimizer=optimizer, ema=ema).restored
    for one, values in zip((model, ema.module), good, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())
    train(model, WORDS, optimizer)
    ema.update_parameters(model)
